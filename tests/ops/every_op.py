"""A small problem of every op, for what all of them must do alike."""

import test_channel_aggregation_ffn
import test_cross_covariance
import test_dwconv
import test_dwconv_layer_norm
import test_feature_decompose
import test_gated_recursion
import test_global_filter
import test_gnconv
import test_layer_norm_2d
import test_moga_aggregation
import test_moga_gate
import test_multi_order_dwconv
import test_s2_attention
import test_shift_split_attention
import test_split_cascade
import test_xca
from harness import Case

MAP, TOKENS = (2, 16, 6, 5), (2, 5, 6, 8)
_MAKERS = {
    "channel_aggregation_ffn": lambda **o: test_channel_aggregation_ffn.make(MAP, 24, **o),
    "cross_covariance": lambda **o: test_cross_covariance.make((2, 2, 8, 30), **o),
    "dwconv": lambda **o: test_dwconv.make(MAP, stride=2, padding=(1, 0, 2, 1), activation="gelu", **o),
    "dwconv_layer_norm": lambda **o: test_dwconv_layer_norm.make(MAP, 5, **o),
    "feature_decompose": lambda **o: test_feature_decompose.make(MAP, **o),
    "gated_recursion": lambda **o: test_gated_recursion.make((2, 6, 5), **o),
    "global_filter": lambda **o: test_global_filter.make(MAP, **o),
    "gnconv": lambda **o: test_gnconv.make(MAP, **o),
    "layer_norm_2d": lambda **o: test_layer_norm_2d.make(MAP, **o),
    "moga_aggregation": lambda **o: test_moga_aggregation.make(MAP, **o),
    "moga_gate": lambda **o: test_moga_gate.make(MAP, **o),
    "multi_order_dwconv": lambda **o: test_multi_order_dwconv.make(MAP, **o),
    "s2_attention": lambda **o: test_s2_attention.make(TOKENS, **o),
    "shift_split_attention": lambda **o: test_shift_split_attention.make(TOKENS, **o),
    "split_cascade": lambda **o: test_split_cascade.make(MAP, 3, **o),
    "xca": lambda **o: test_xca.make(30, 16, **o),
}
NAMES = sorted(_MAKERS)


def make(name: str, **options: object) -> Case:
    """options: dtype."""
    return _MAKERS[name](**options)
