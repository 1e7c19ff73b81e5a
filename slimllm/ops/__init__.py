"""Operations of the engine, also for third-party methods (docs/reference/operations.md).

Every operation has a plain torch path, which runs anywhere. Some have a Triton kernel or are in the compiled extension;
`dispatch.py` decides which one runs.
"""

from slimllm.ops.channels import feature_space_importance
from slimllm.ops.columns import column_products_, column_sums_
from slimllm.ops.dispatch import backend
from slimllm.ops.elimination import greedy_elimination
from slimllm.ops.gram import gram_
from slimllm.ops.heads import head_covariance, head_covariance_of_tokens
from slimllm.ops.lstsq import lstsq, lstsq_ex
from slimllm.ops.pearson import head_importance, pearson_greedy, pearson_similarity
from slimllm.ops.regression import affine_fit
from slimllm.ops.substitution import half_solve_, quadratic_forms
from slimllm.ops.tokens import token_cosine

__all__ = [
    "affine_fit",
    "backend",
    "column_products_",
    "column_sums_",
    "feature_space_importance",
    "gram_",
    "greedy_elimination",
    "half_solve_",
    "head_covariance",
    "head_covariance_of_tokens",
    "head_importance",
    "lstsq",
    "lstsq_ex",
    "pearson_greedy",
    "pearson_similarity",
    "quadratic_forms",
    "token_cosine",
]
