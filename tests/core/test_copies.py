"""Of equal samples the first stays, or those that must."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adq_wds.core.copies import first_of, who_stays

SAMPLES = st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=20)


@given(SAMPLES)
def test_the_first_of_equal_samples_stays_or_those_that_must(samples: list[tuple[int, bool, bool]]) -> None:
    contents, among, must = (np.array([row[i] for row in samples]) for i in range(3))
    among, must = among.astype(bool), must.astype(bool) & among.astype(bool)
    digest = np.repeat(contents.astype(np.uint8), 16).reshape(-1, 16)
    first = first_of(digest, among)
    stays = who_stays(first, must)
    for i in range(len(samples)):
        equal = (
            [j for j in range(len(samples)) if among[j] and contents[j] == contents[i]] if among[i] else [i]
        )
        assert first[i] == equal[0]
        musts = [j for j in equal if must[j]]
        assert stays[i] == (i if must[i] else (musts or equal)[0])
