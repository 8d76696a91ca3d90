"""The ops in plain PyTorch: their definition, the fallback, and what "eager" means in the benchmarks."""

from .batch_norm_act import batch_norm_act as batch_norm_act
from .channel_aggregation_ffn import channel_aggregation_ffn as channel_aggregation_ffn
from .cross_covariance import cross_covariance as cross_covariance
from .dwconv import dwconv as dwconv
from .dwconv_layer_norm import dwconv_layer_norm as dwconv_layer_norm
from .feature_decompose import feature_decompose as feature_decompose
from .gated_recursion import gated_recursion as gated_recursion
from .global_filter import global_filter as global_filter
from .gnconv import gnconv as gnconv
from .layer_norm_2d import layer_norm_2d as layer_norm_2d
from .mbconv import mbconv as mbconv
from .mlp import mlp as mlp
from .moga_aggregation import moga_aggregation as moga_aggregation
from .moga_gate import moga_gate as moga_gate
from .multi_order_dwconv import multi_order_dwconv as multi_order_dwconv
from .relative_attention import relative_attention as relative_attention
from .relative_self_attention import relative_self_attention as relative_self_attention
from .s2_attention import s2_attention as s2_attention
from .scaled_residual import scaled_residual as scaled_residual
from .shift_split_attention import shift_split_attention as shift_split_attention
from .split_cascade import split_cascade as split_cascade
from .xca import xca as xca
