"""From folders of captioned pictures to batches: sources, index, buckets and plan, cache, loader."""
