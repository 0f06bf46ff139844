"""Published functions with their own arguments and results, on our engine: change one import."""

from dive_fast.compat.diffusion_classifier import eval_error, eval_prob_adaptive

__all__ = ["eval_error", "eval_prob_adaptive"]
