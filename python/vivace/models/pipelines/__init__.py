"""Foreign models: pipelines, denoisers and folders of `diffusers`, loaded, accelerated in place, and restored."""
