"""Changes to a folder of captioned pictures, recorded beside it so that they can be taken back."""
