"""r1s_jax: teach a language model to search, in one JAX program."""

__version__ = "0.2.0"
