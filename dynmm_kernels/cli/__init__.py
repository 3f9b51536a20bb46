"""The commands of python -m dynmm_kernels: each has add_arguments(parser) and run(arguments)."""
