from __future__ import annotations

import pytest

from pipeline.core.errors import SettingError
from pipeline.stages.captions import Mix


def test_a_name_alone_is_all_of_the_mix():
    assert Mix.parse("alt").weights == {"alt": 1.0}
    assert Mix.parse("alt:3, colour:1").weights == {"alt": 0.75, "colour": 0.25}


@pytest.mark.parametrize(
    "text", ["", "alt:x", "alt:-1", "alt:0", ":1", "alt:nan", "alt,", "a:1,b:1,a:2"]
)
def test_what_is_no_mix_is_refused(text):
    with pytest.raises(SettingError, match="captions="):
        Mix.parse(text)


def test_draws_follow_the_weights_and_depend_on_seed_and_key_alone():
    mix = Mix.parse("alt:0.75,colour:0.25")
    keys = [f"{i:09d}" for i in range(4000)]
    drawn = [mix.draw(0, key) for key in keys]
    assert 0.73 < drawn.count("alt") / 4000 < 0.77
    assert drawn == [mix.draw(0, key) for key in keys]
    assert drawn != [mix.draw(1, key) for key in keys]
