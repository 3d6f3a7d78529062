"""The embedded teacher's server: SGLang's scoring and generation in a subset, over this package's decoder."""
