"""The synthesised sample: repeatable, quick, and speech-like enough to be told apart by its spectrum."""

import time

import numpy as np
import pytest

from selfsup.plugins.common.speech import COUNT, RATE, WORDS, Speech


def wave(i):
    return Speech()[i]["audio"]["array"]


def spectrum(x):
    """Power by frequency (128 bands of 62.5 Hz) of [N] over frames of 16 ms: [frames, 129]."""
    frames = np.lib.stride_tricks.sliding_window_view(x, 256)[::128]
    return np.abs(np.fft.rfft(frames * np.hanning(256))) ** 2


def test_utterances_are_a_function_of_their_number():
    assert np.array_equal(wave(17), wave(17))
    assert not np.array_equal(wave(17)[:8000], wave(27)[:8000])  # the same word in another voice
    assert Speech()[17]["label"] == Speech()[27]["label"] == 7


def test_shape_of_the_sample():
    speech = Speech()
    assert len(speech) == COUNT
    assert {s["label"] for s in speech[:10]} == set(range(len(WORDS)))
    for i in range(0, COUNT, 37):
        x = wave(i)
        assert x.dtype == np.float32
        assert RATE <= len(x) <= 3 * RATE
        assert np.isfinite(x).all()
        assert 0.1 < np.abs(x).max() < 1
    assert np.array_equal(speech[-1]["audio"]["array"], wave(COUNT - 1))
    with pytest.raises(IndexError, match="480 utterances"):
        speech[COUNT]


def test_an_utterance_takes_milliseconds():
    wave(0)
    start = time.thread_time()
    for i in range(20):
        wave(i)
    assert (time.thread_time() - start) / 20 < 0.03


def test_pauses_are_quiet_and_vowels_loud():
    power = spectrum(wave(0)).sum(1)
    assert power[:10].mean() < 1e-4 * power.max()


def test_fricatives_lie_high_and_vowels_have_their_formants():
    power = spectrum(wave(0))  # masu
    frequency = np.arange(129) * RATE / 256
    voiced = power[power.sum(1) > 0.3 * power.sum(1).max()].mean(0)  # mostly the a
    assert 500 < frequency[voiced.argmax()] < 1300
    share = power[:, frequency > 4500].sum(1) / power.sum(1)
    hiss = (share > 0.8) & (power.sum(1) > 1e-3 * power.sum(1).max())
    assert 10 < hiss.sum() < 60  # the s of three repetitions
    assert power[hiss][:, frequency > 4500].sum() > 10 * power[hiss][:, frequency < 3000].sum()


def test_words_can_be_told_apart_across_voices():
    """One nearest neighbour on the spectra's averages: far above the chance of 0.1."""
    x = np.stack([np.log(spectrum(wave(i)).mean(0) + 1e-6) for i in range(80)])
    x -= x.mean(1, keepdims=True)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) + np.diag(np.full(80, np.inf))
    found = distance.argmin(1) % 10 == np.arange(80) % 10
    assert found.mean() > 0.5
