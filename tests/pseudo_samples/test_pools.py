"""What a run says of the rows of earlier tasks that it sees and keeps."""

import pytest

from sapt_jax.data.encoding import EncodedSplit, Ragged
from sapt_jax.methods.base import OLD_DATA
from sapt_jax.pseudo_samples.pools import rows_kept
from tests.helpers.tiny import tiny_method


def test_rows_kept_are_those_of_tasks_that_have_a_pool():
    pools = {index: EncodedSplit(*[Ragged.from_rows([[3, 4]] * rows)] * 2, 0, 0) for index, rows in ((0, 4), (2, 3))}
    assert [rows_kept(pools, count) for count in range(4)] == [0, 4, 4, 7]


@pytest.mark.parametrize("source", OLD_DATA)
def test_the_kind_of_old_data_follows_the_source_where_the_method_wants_any(source):
    assert tiny_method().old_data(source) == OLD_DATA[source]
    assert tiny_method(kl_ratio=0.0).old_data(source) == tiny_method("ewc").old_data(source) == "none"
