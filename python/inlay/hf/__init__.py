"""Sets Inlay's ops into existing models, and takes them out again. See docs/patching.md."""
