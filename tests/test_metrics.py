"""Figures of a run: by hand, against scikit-learn and plain numpy, and where there is little."""

from __future__ import annotations

import builtins
import logging
import math

import numpy as np
import pytest
import sklearn.metrics as sk
from run_records import record

from dive_fast.errors import DiveFastError, RunError
from dive_fast.evaluation import metrics, summarise
from dive_fast.evaluation.metrics import FIGURES
from dive_fast.evaluation.table import RunTable, table_of

# Right; wrong, the truth second; right; wrong, the truth not measured.
BY_HAND = [
    record("a", 0, [0.7, 0.2, 0.1], groups={"eye": "left"}),
    record("b", 2, [0.5, 0.1, 0.4], groups={"eye": "right"}),
    record("c", 1, [0.1, 0.8, 0.1], groups={"eye": "left"}),
    record("d", 1, [0.6, 0.0, 0.4], groups={"eye": "right"}),
]


@pytest.fixture(scope="module")
def random() -> tuple[RunTable, np.ndarray, np.ndarray]:
    """300 images of 7 classes with their posteriors and truths; 6 is never true."""
    numbers = np.random.default_rng(5)
    truth = numbers.integers(0, 6, 300)
    energy = numbers.normal(size=(300, 7))
    energy[np.arange(300), truth] += 1.5
    p = np.exp(energy) / np.exp(energy).sum(1, keepdims=True)
    records = [record(str(i), int(truth[i]), p[i].tolist()) for i in range(300)]
    return table_of(records), p, truth


class TestByHand:
    def test_figures(self) -> None:
        found = metrics.figures(table_of(BY_HAND))
        assert found.n == 4 and found.top1 == 0.5 and found.top5 is None
        # Recalls 1, 1/2, 0.
        assert found.mean_per_class == pytest.approx(0.5)
        # 0: tp 1, fp 2; 1: tp 1, fn 1; 2: fn 1.
        assert found.macro_f1 == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)
        # 0: 0.7 above 0.5, 0.1, 0.6: 1. 1: 0.8 above 0.2, 0.1; 0 below both: 1/2. 2: 0.4 above 0.1
        # twice and equal to 0.4 once: 5/6.
        assert found.auroc == pytest.approx((1 + 0.5 + 2.5 / 3) / 3)
        # Each answer has a bin of its own but 0.6 and 0.5, in (8/15, 9/15] and (7/15, 8/15].
        assert found.ece == pytest.approx((0.3 + 0.5 + 0.2 + 0.6) / 4)
        assert found.nll == pytest.approx(-np.log([0.7, 0.4, 0.8, 1e-6]).mean())
        brier = [0.09 + 0.04 + 0.01, 0.25 + 0.01 + 0.36, 0.01 + 0.04 + 0.01, 0.36 + 1 + 0.16]
        assert found.brier == pytest.approx(np.mean(brier))
        errors = found.standard_errors
        assert errors["top1"] == pytest.approx(0.25)
        assert errors["mean_per_class"] == pytest.approx((0.25 / 2) ** 0.5 / 3)
        assert errors["brier"] == pytest.approx(np.std(brier, ddof=1) / 2)
        assert errors["nll"] == pytest.approx(np.std(np.log([0.7, 0.4, 0.8, 1e-6]), ddof=1) / 2)
        assert errors["top5"] is None
        assert found.to_dict()["standard_errors"] == errors

    def test_per_class(self) -> None:
        zero, one, two = metrics.per_class(table_of(BY_HAND))
        assert (zero.name, zero.row, zero.n, zero.answered) == ("c0", 0, 1, 3)
        assert (zero.recall, zero.precision, zero.f1) == (1, pytest.approx(1 / 3), 0.5)
        assert (one.recall, one.precision, one.f1) == (0.5, 1, pytest.approx(2 / 3))
        assert one.standard_error == pytest.approx((0.25 / 2) ** 0.5)
        # Never answered: no precision.
        assert (two.n, two.answered, two.recall, two.precision, two.f1) == (1, 0, 0, None, 0)

    def test_confusion(self) -> None:
        expected = [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
        assert metrics.confusion(table_of(BY_HAND)).tolist() == expected

    def test_reliability(self) -> None:
        low, high = metrics.reliability(table_of(BY_HAND), 2)
        assert (low.low, low.high, low.n) == (0, 0.5, 1)
        assert (low.confidence, low.accuracy, low.standard_error) == (0.5, 0, 0)
        assert (high.n, high.confidence) == (3, pytest.approx(0.7))
        assert high.accuracy == pytest.approx(2 / 3)
        assert high.standard_error == pytest.approx((2 / 9 / 3) ** 0.5)

    def test_coverage(self) -> None:
        found = metrics.coverage(table_of(BY_HAND))
        # 0.8 right, 0.7 right, 0.6 and 0.5 wrong.
        assert [(p.coverage, p.n) for p in found.points] == [(0.25, 1), (0.5, 2), (0.75, 3), (1, 4)]
        assert [p.accuracy for p in found.points] == pytest.approx([1, 1, 2 / 3, 1 / 2])
        assert found.points[2].standard_error == pytest.approx((2 / 9 / 3) ** 0.5)
        assert found.area == pytest.approx((1 / 3 + 1 / 2) / 4)

    def test_coverage_of_equal_probabilities(self) -> None:
        """Two right among three alike: whichever comes first, what is expected is 2/3."""
        three = [
            record(key, truth, [0.6, 0.4]) for key, truth in zip("abc", (0, 1, 0), strict=True)
        ]
        for order in (three, three[::-1], [three[1], three[0], three[2]]):
            found = metrics.coverage(table_of([*order, record("d", 0, [0.1, 0.9])]))
            assert [p.accuracy for p in found.points] == pytest.approx([0, 1 / 3, 4 / 9, 1 / 2])

    def test_groups(self) -> None:
        table = table_of(BY_HAND)
        found = metrics.by_group(table, "eye")
        assert list(found.figures) == ["left", "right"]
        assert found.figures["left"].top1 == 1 and found.figures["right"].n == 2
        assert (found.worst, found.worst_accuracy) == ("right", 0)
        alone = metrics.figures(table_of([BY_HAND[1], BY_HAND[3]]))
        assert found.figures["right"] == alone
        assert found.to_dict()["worst_accuracy"] == 0
        assert metrics.by_group(table, "eye", np.array([0])).figures["left"].n == 1

    def test_no_such_group(self) -> None:
        table = table_of(BY_HAND)
        with pytest.raises(RunError, match=r"is grouped by \('eye'\), got 'age'"):
            metrics.by_group(table, "age")
        with pytest.raises(RunError, match=r"is grouped by \(none\), got 'age'"):
            metrics.by_group(table_of([record("a", 0, [1.0])]), "age")

    def test_a_measured_probability_below_float32(self) -> None:
        one = record("a", 1, [1.0, 0.0])
        one["log_posterior"] = [0.0, -200.0]
        assert metrics.figures(table_of([one])).nll == 200


class TestAgainstLibraries:
    def test_figures(self, random) -> None:
        table, p, truth = random
        found, answer = metrics.figures(table), p.argmax(1)
        assert found.top1 == pytest.approx((answer == truth).mean())
        assert found.top5 == pytest.approx(sk.top_k_accuracy_score(truth, p, k=5, labels=range(7)))
        assert found.mean_per_class == pytest.approx(
            np.mean([(answer[truth == c] == c).mean() for c in range(6)])
        )
        areas = []
        for c in range(6):
            right, other = p[truth == c, c], p[truth != c, c]
            areas.append((right[:, None] > other).mean())
        assert found.auroc == pytest.approx(np.mean(areas), abs=1e-9)
        assert found.macro_f1 == pytest.approx(sk.f1_score(truth, answer, average="macro"))
        assert found.nll == pytest.approx(sk.log_loss(truth, p, labels=range(7)))
        own = np.eye(7)[truth]
        assert found.brier == pytest.approx(((p - own) ** 2).sum(1).mean(), rel=1e-6)
        bins = np.ceil(p.max(1) * 15)
        gaps = [
            (bins == b).mean()
            * abs((answer == truth)[bins == b].mean() - p.max(1)[bins == b].mean())
            for b in np.unique(bins)
        ]
        assert found.ece == pytest.approx(sum(gaps), abs=1e-6)

    def test_errors_are_those_of_a_bootstrap(self, random, monkeypatch) -> None:
        table, p, truth = random
        draw, answer, top, drawn = np.random.default_rng(1), p.argmax(1), p.max(1), []
        for _ in range(300):
            i = draw.integers(0, 300, 300)
            bins, gap = np.ceil(top[i] * 15).astype(int), (answer == truth)[i] - top[i]
            drawn.append(
                (
                    np.mean([sk.roc_auc_score(truth[i] == c, p[i, c]) for c in range(6)]),
                    sk.f1_score(truth[i], answer[i], average="macro"),
                    np.abs(np.bincount(bins, gap)).sum() / 300,
                )
            )
        errors = metrics.figures(table).standard_errors
        expected = dict(zip(("auroc", "macro_f1", "ece"), np.std(drawn, axis=0), strict=True))
        for name, within in (("auroc", 0.1), ("macro_f1", 0.1), ("ece", 0.3)):
            assert errors[name] == pytest.approx(expected[name], rel=within), name
        monkeypatch.setattr(metrics, "_QUICK", 2099)
        assert metrics.figures(table).standard_errors["auroc"] is None

    def test_many_blocks_are_one(self, random, monkeypatch) -> None:
        """Whatever is held of the posteriors at once, in classes and in rows."""
        table, _, _ = random
        whole = metrics.figures(table)
        monkeypatch.setattr(metrics, "_BLOCK", 650)
        parts = metrics.figures(table)
        assert parts.auroc == pytest.approx(whole.auroc) and parts.brier == pytest.approx(
            whole.brier
        )

    def test_per_class_and_confusion(self, random) -> None:
        table, p, truth = random
        answer, found = p.argmax(1), metrics.per_class(table)
        for c, of in enumerate(found[:6]):
            assert of.recall == pytest.approx((answer[truth == c] == c).mean())
            assert of.precision == pytest.approx((truth[answer == c] == c).mean())
        assert found[6].n == 0 and found[6].recall is found[6].standard_error is None
        counts = [[((truth == a) & (answer == b)).sum() for b in range(7)] for a in range(7)]
        assert metrics.confusion(table).tolist() == counts

    def test_reliability_is_what_ece_is_made_of(self, random) -> None:
        table, _, _ = random
        bins = metrics.reliability(table)
        assert len(bins) == 15 and sum(b.n for b in bins) == 300
        gap = sum(b.n * abs(b.accuracy - b.confidence) for b in bins if b.n) / 300
        assert gap == pytest.approx(metrics.figures(table).ece)

    def test_coverage(self, random) -> None:
        table, p, truth = random
        order = np.argsort(-p.max(1))
        right = (p.argmax(1) == truth)[order].cumsum() / np.arange(1, 301)
        found = metrics.coverage(table)
        assert len(found.points) == 20
        assert [q.accuracy for q in found.points] == pytest.approx(right[14::15])
        assert found.area == pytest.approx(1 - right.mean())


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
class TestLittle:
    def test_no_image(self) -> None:
        table = table_of([])
        assert metrics.figures(table).to_dict() == {
            "n": 0, **dict.fromkeys(FIGURES), "standard_errors": dict.fromkeys(FIGURES)
        }  # fmt: skip
        assert metrics.per_class(table) == [] and metrics.confusion(table).shape == (0, 0)
        assert all(b.n == 0 and b.accuracy is None for b in metrics.reliability(table))
        assert metrics.coverage(table).points == [] and metrics.coverage(table).area is None

    def test_failures_alone(self) -> None:
        found = summarise([{"id": "a", "truth": 1, "error": "bad"}])
        assert (found.n, found.failed, found.accuracy, found.auroc) == (0, 1, None, None)

    def test_one_image(self) -> None:
        found = metrics.figures(table_of([record("a", 0, [0.6, 0.4])]))
        assert (found.top1, found.mean_per_class, found.auroc) == (1, 1, None)
        assert found.macro_f1 == 1 and found.nll == pytest.approx(-math.log(0.6))
        assert found.standard_errors["top1"] == 0
        assert all(
            found.standard_errors[name] is None for name in ("nll", "brier", "ece", "macro_f1")
        )

    def test_one_class(self) -> None:
        table = table_of([record("a", 0, [1.0]), record("b", 0, [1.0])])
        found = metrics.figures(table)
        assert metrics.confusion(table).tolist() == [[2]] and metrics.per_class(table)[0].f1 == 1
        assert (found.top1, found.auroc, found.macro_f1) == (1, None, 1)
        assert (found.nll, found.brier, found.ece) == (0, 0, 0)

    def test_all_wrong(self) -> None:
        table = table_of([record("a", 0, [0.2, 0.8, 0.0]), record("b", 0, [0.4, 0.6, 0.0])])
        found = metrics.figures(table)
        assert (found.top1, found.mean_per_class, found.macro_f1) == (0, 0, 0)
        assert found.auroc is None  # class 0 is all there is
        assert metrics.per_class(table)[2].f1 is None  # neither true nor answered
        assert metrics.coverage(table).area == 1

    def test_twins(self) -> None:
        """Equal posteriors: an area of a half, and not whichever comes first."""
        twins = [record(str(i), i % 2, [0.5, 0.5]) for i in range(6)]
        found = metrics.figures(table_of(twins))
        assert found.auroc == 0.5 and found.top1 == 0.5

    def test_without_posteriors(self) -> None:
        few = {"probability": 0.5, "evaluations": 1, "seconds": 0.0}
        rows = [{"id": str(i), "truth": i % 6, "index": 0, **few} for i in range(12)]
        found = metrics.figures(table_of(rows))
        assert found.top1 == pytest.approx(1 / 6) and found.macro_f1 is not None
        assert found.top5 is found.auroc is found.nll is found.brier is None

    @pytest.mark.parametrize("bins", [0, 1.5, None, True])
    def test_no_bins(self, bins: object) -> None:
        with pytest.raises(DiveFastError, match="bins must be"):
            metrics.reliability(table_of(BY_HAND), bins)


class TestWithoutScikitLearn:
    @pytest.fixture(autouse=True)
    def hide(self, monkeypatch) -> None:
        there = builtins.__import__

        def absent(name: str, *rest: object, **more: object):
            if name.split(".")[0] == "sklearn":
                raise ImportError(name)
            return there(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", absent)

    def test_the_rest_is_there(self, caplog) -> None:
        found = metrics.figures(table_of(BY_HAND))
        assert found.auroc is found.macro_f1 is None
        assert found.top1 == 0.5 and found.nll is not None and found.brier is not None
        with caplog.at_level(logging.WARNING):
            metrics.tell_what_is_missing()
        assert caplog.messages == [
            "AUROC and macro F1 are left out, they need scikit-learn: "
            "pip install 'dive_fast[metrics]'."
        ]

    @pytest.mark.parametrize("wanted", [metrics.per_class, metrics.confusion])
    def test_nothing_without_it(self, wanted) -> None:
        with pytest.raises(DiveFastError, match=r"needs scikit-learn: pip install 'dive_fast\[met"):
            wanted(table_of(BY_HAND))
