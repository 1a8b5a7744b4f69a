"""The public functions, one file per op family: argument checks, autograd and fake implementations."""
