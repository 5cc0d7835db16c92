"""The Triton kernels; importing one needs Triton. Each file mirrors the op of the same name."""
