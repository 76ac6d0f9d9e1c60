"""Run files: the schema, reading and writing them, advice, and other tools' formats. Never imports torch."""
