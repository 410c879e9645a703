# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_trainer.data.partition import (
    dirichlet_partition,
    iid_partition,
    natural_partition,
    partition_counts,
    partition_summary,
    pathological_partition,
    quantity_skew_partition,
)
from fed_trainer.data.table import format_table


quick = settings(deadline=None, max_examples=30, derandomize=True)
label_lists = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)


def make_dataset(labels):
    return Dataset.from_dict({"row": list(range(len(labels))), "label": labels})


def rows_of(clients):
    return {name: client["row"][:] for name, client in clients.items()}


def check_exact(clients, dataset):
    """Every row is in exactly one client, whole, and a client keeps the order of the dataset."""
    rows = rows_of(clients)
    assert sorted(row for client in rows.values() for row in client) == list(range(len(dataset)))
    assert all(client == sorted(client) for client in rows.values())
    labels = dataset["label"][:]
    assert all(client["label"][:] == [labels[row] for row in rows[name]] for name, client in clients.items())
    assert list(clients) == sorted(clients)


@pytest.fixture
def dataset():
    """1,000 rows of ten labels with 100 rows each, in shuffled order."""
    labels = np.random.default_rng(0).permutation([f"label_{index % 10}" for index in range(1000)]).tolist()
    return make_dataset(labels)


ARTIFICIAL = {
    "iid": lambda dataset, seed: iid_partition(dataset, 8, seed=seed),
    "quantity skew": lambda dataset, seed: quantity_skew_partition(dataset, 8, alpha=1.0, seed=seed),
    "dirichlet": lambda dataset, seed: dirichlet_partition(dataset, 8, alpha=0.5, column="label", seed=seed),
    "pathological": lambda dataset, seed: pathological_partition(dataset, 8, 2, column="label", seed=seed),
}


class TestEveryPartition:
    @pytest.mark.parametrize("partition", ARTIFICIAL.values(), ids=ARTIFICIAL.keys())
    def test_same_seed_same_split_and_other_seed_other_split(self, dataset, partition):
        first, again, other = (rows_of(partition(dataset, seed)) for seed in (3, 3, 4))
        assert first == again
        assert first != other

    def test_rows_of_a_label_are_shuffled(self):
        dataset = make_dataset(["a"] * 100)
        for clients in (
            iid_partition(dataset, 2),
            quantity_skew_partition(dataset, 2, alpha=5.0),
            dirichlet_partition(dataset, 2, alpha=5.0, column="label"),
            pathological_partition(dataset, 2, 1, column="label"),
        ):
            # Cut into two runs, or dealt in turn, the rows of a client would be evenly spaced.
            assert all(len(set(np.diff(rows))) > 2 for rows in rows_of(clients).values())

    @pytest.mark.parametrize("partition", ARTIFICIAL.values(), ids=ARTIFICIAL.keys())
    def test_global_random_state_is_neither_read_nor_changed(self, dataset, partition):
        np.random.seed(0)
        before = np.random.get_state()[1].copy()
        rows = rows_of(partition(dataset, 0))
        assert np.array_equal(before, np.random.get_state()[1])
        np.random.seed(1)
        assert rows_of(partition(dataset, 0)) == rows

    def test_names_are_padded_to_equal_width(self, dataset):
        assert list(iid_partition(dataset, 3)) == ["client_0", "client_1", "client_2"]
        assert list(iid_partition(dataset, 10))[-1] == "client_9"
        names = list(iid_partition(dataset, 11))
        assert (names[0], names[9], names[10]) == ("client_00", "client_09", "client_10")

    def test_a_formatted_and_reordered_dataset_is_split_by_its_visible_rows(self):
        dataset = make_dataset([7, 8, 7, 9]).select([3, 2, 1, 0]).with_format("torch")
        clients = natural_partition(dataset, "label")
        assert {name: client["row"][:].tolist() for name, client in clients.items()} == {
            "7": [2, 0],
            "8": [1],
            "9": [3],
        }


class TestNaturalPartition:
    @quick
    @given(labels=label_lists)
    def test_one_client_per_value(self, labels):
        dataset = make_dataset(labels)
        clients = natural_partition(dataset, "label")
        check_exact(clients, dataset)
        assert {name: set(client["label"][:]) for name, client in clients.items()} == {
            label: {label} for label in labels
        }

    def test_numbers_become_names(self):
        clients = natural_partition(make_dataset([10, 9, 10]), "label")
        assert rows_of(clients) == {"10": [0, 2], "9": [1]}
        assert list(clients) == ["10", "9"]

    def test_class_labels_are_named_by_their_integer(self):
        features = Features({"row": Value("int64"), "label": ClassLabel(names=["no", "yes"])})
        dataset = Dataset.from_dict({"row": [0, 1, 2], "label": [1, 0, 1]}, features=features)
        assert rows_of(natural_partition(dataset, "label")) == {"0": [1], "1": [0, 2]}


class TestIidPartition:
    @quick
    @given(data=st.data(), labels=label_lists, seed=seeds)
    def test_sizes_differ_by_at_most_one(self, data, labels, seed):
        dataset = make_dataset(labels)
        num_clients = data.draw(st.integers(1, len(labels)))
        clients = iid_partition(dataset, num_clients, seed=seed)
        check_exact(clients, dataset)
        sizes = [len(client) for client in clients.values()]
        assert len(sizes) == num_clients
        assert max(sizes) - min(sizes) <= 1


class TestQuantitySkewPartition:
    @quick
    @given(
        labels=st.lists(st.sampled_from("ab"), min_size=40, max_size=60), seed=seeds, min_examples=st.integers(1, 5)
    )
    def test_exact_with_enough_examples_each(self, labels, seed, min_examples):
        dataset = make_dataset(labels)
        clients = quantity_skew_partition(dataset, 4, alpha=5.0, seed=seed, min_examples=min_examples)
        check_exact(clients, dataset)
        assert len(clients) == 4
        assert min(len(client) for client in clients.values()) >= min_examples

    def test_alpha_sets_the_spread_of_the_sizes(self, dataset):
        def spread(alpha):
            return np.std([len(client) for client in quantity_skew_partition(dataset, 10, alpha).values()])

        # The standard deviation of a share of Dirichlet(alpha) over K clients is sqrt((K - 1) / (K^2 (K alpha + 1))).
        assert spread(10000.0) < 2
        assert spread(1.0) > 40

    def test_content_is_not_skewed(self, dataset):
        clients = quantity_skew_partition(dataset, 2, alpha=5.0, seed=0)
        for client in clients.values():
            shares = [count / len(client) for count in Counter(client["label"][:]).values()]
            assert len(shares) == 10
            assert max(shares) < 0.2


class TestDirichletPartition:
    @quick
    @given(
        labels=st.lists(st.sampled_from("abcd"), min_size=40, max_size=60),
        alpha=st.floats(1.0, 1e6),
        seed=seeds,
        min_examples=st.integers(1, 3),
    )
    def test_exact_with_enough_examples_each(self, labels, alpha, seed, min_examples):
        dataset = make_dataset(labels)
        clients = dirichlet_partition(dataset, 4, alpha, "label", seed=seed, min_examples=min_examples)
        check_exact(clients, dataset)
        assert len(clients) == 4
        assert min(len(client) for client in clients.values()) >= min_examples

    @quick
    @given(alpha=st.floats(0.05, 100.0), seed=seeds)
    def test_counts_are_the_drawn_proportions_rounded(self, alpha, seed):
        # The same draws again, one label at a time, until no client is empty.
        num_rows = {"a": 31, "b": 17, "c": 50}
        dataset = make_dataset([label for label, rows in num_rows.items() for _ in range(rows)])
        counts = partition_counts(dirichlet_partition(dataset, 3, alpha, "label", seed=seed), "label")

        generator = np.random.default_rng(np.random.SeedSequence(seed))
        while True:
            exact = {label: rows * generator.dirichlet([alpha] * 3) for label, rows in num_rows.items()}
            rounded = {label: largest_remainder(shares.tolist()) for label, shares in exact.items()}
            if all(sum(column) >= 1 for column in zip(*rounded.values(), strict=True)):
                break
        for index, client in enumerate(("client_0", "client_1", "client_2")):
            assert counts[client] == {label: rounded[label][index] for label in num_rows}

    def test_alpha_sets_the_skew(self, dataset):
        def largest_shares(alpha):
            counts = partition_counts(dirichlet_partition(dataset, 5, alpha, "label"), "label")
            return [max(client.values()) / sum(client.values()) for client in counts.values()]

        assert max(largest_shares(10000.0)) < 0.12  # Ten labels in equal parts: 0.1.
        assert np.mean(largest_shares(0.05)) > 0.3

    def test_draws_again_until_each_client_has_enough(self, dataset):
        # Over seeds, a first draw at this alpha often leaves one of the clients below 40 of its mean of 100 rows.
        for seed in range(5):
            clients = dirichlet_partition(dataset, 10, 0.5, "label", seed=seed, min_examples=40)
            assert min(len(client) for client in clients.values()) >= 40
        firsts = [dirichlet_partition(dataset, 10, 0.5, "label", seed=seed) for seed in range(5)]
        assert any(len(client) < 40 for clients in firsts for client in clients.values())

    @pytest.mark.parametrize("alpha", [1e-12, 1e12])
    def test_extreme_alpha_stays_exact(self, dataset, alpha):
        clients = dirichlet_partition(dataset, 2, alpha, "label", seed=1)
        check_exact(clients, dataset)


def largest_remainder(exact):
    """Counting by hand: the whole parts, and what is left over to the largest fractions."""
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: exact[index] - counts[index], reverse=True)
    for index in order[: round(sum(exact)) - sum(counts)]:
        counts[index] += 1
    return counts


class TestPathologicalPartition:
    @quick
    @given(data=st.data(), num_classes=st.integers(1, 6), num_clients=st.integers(1, 8), seed=seeds)
    def test_exact_even_and_with_exactly_the_classes_asked_for(self, data, num_classes, num_clients, seed):
        classes_per_client = data.draw(st.integers(-(-num_classes // num_clients), num_classes))
        extra = data.draw(st.lists(st.integers(0, num_classes - 1), max_size=30))
        dataset = make_dataset([*range(num_classes)] * num_clients + extra)
        clients = pathological_partition(dataset, num_clients, classes_per_client, "label", seed=seed)
        check_exact(clients, dataset)

        counts = partition_counts(clients, "label")
        assert len(counts) == num_clients
        assert all(sum(rows > 0 for rows in client.values()) == classes_per_client for client in counts.values())
        shares = [
            [client[str(label)] for client in counts.values() if client[str(label)]] for label in range(num_classes)
        ]
        assert all(max(share) - min(share) <= 1 for share in shares)
        num_holders = [len(share) for share in shares]
        assert max(num_holders) - min(num_holders) <= 1

    def test_clients_do_not_share_one_fixed_pairing(self, dataset):
        counts = partition_counts(pathological_partition(dataset, 20, 2, "label"), "label")
        pairs = {tuple(label for label, rows in client.items() if rows) for client in counts.values()}
        assert len(pairs) > 5


class TestPartitionCounts:
    def test_counts_every_label_at_every_client(self):
        clients = {"x": make_dataset([10, 9, 10]), "y": make_dataset([2])}
        counts = partition_counts(clients, "label")
        assert counts == {"x": {"2": 0, "9": 1, "10": 2}, "y": {"2": 1, "9": 0, "10": 0}}
        assert list(counts["x"]) == list(counts["y"]) == ["2", "9", "10"]

    @quick
    @given(labels=st.lists(st.sampled_from("abcd"), min_size=20, max_size=60), seed=seeds)
    def test_sums_are_those_of_the_dataset(self, labels, seed):
        counts = partition_counts(iid_partition(make_dataset(labels), 3, seed=seed), "label")
        assert sum((Counter(client) for client in counts.values()), Counter()) == Counter(labels)

    def test_clients_with_labels_of_different_types(self):
        counts = partition_counts({"x": make_dataset([1]), "y": make_dataset(["one"])}, "label")
        assert counts == {"x": {"1": 1, "one": 0}, "y": {"1": 0, "one": 1}}


class TestPartitionSummary:
    def test_with_labels(self):
        clients = {"north": make_dataset(["a", "a", "b"]), "south": make_dataset(["c"] * 7), "empty": make_dataset([])}
        clients["empty"] = clients["north"].select([])
        assert partition_summary(clients, "label").splitlines() == [
            "client  examples   share  labels  largest label  its share",
            "------  --------  ------  ------  -------------  ---------",
            "north          3   30.0%       2  a                  66.7%",
            "south          7   70.0%       1  c                 100.0%",
            "empty          0    0.0%       0  -                      -",
            "total         10  100.0%       3  c                  70.0%",
        ]

    def test_without_labels(self):
        clients = {"north": make_dataset(["a", "a", "b"]), "south": make_dataset(["c"])}
        assert partition_summary(clients).splitlines() == [
            "client  examples   share",
            "------  --------  ------",
            "north          3   75.0%",
            "south          1   25.0%",
            "total          4  100.0%",
        ]

    def test_of_many_clients_the_first_are_shown(self):
        clients = iid_partition(make_dataset([0] * 102), 51)
        lines = partition_summary(clients, "label").splitlines()
        assert len(lines) == 2 + 50 + 2
        assert lines[51].startswith("client_49") and lines[52] == "... 1 more"
        assert lines[-1].startswith("total") and "102" in lines[-1]
        assert len(partition_summary(clients, max_clients=3).splitlines()) == 2 + 3 + 2
        assert len(partition_summary(clients, max_clients=None).splitlines()) == 2 + 51 + 1

    def test_table_without_rows(self):
        assert format_table(["name", "count"], [], left_columns=["name"]) == "name  count\n----  -----"


class TestRefusals:
    """Each refusal says what was given, why it cannot work and what to do."""

    def test_unknown_column(self, dataset):
        message = "no column 'topic': pass one of its columns, label, row"
        for partition in (
            lambda: natural_partition(dataset, "topic"),
            lambda: dirichlet_partition(dataset, 2, 1.0, "topic"),
            lambda: pathological_partition(dataset, 5, 2, "topic"),
            lambda: partition_counts({"x": dataset}, "topic"),
            lambda: partition_summary({"x": dataset}, "topic"),
        ):
            with pytest.raises(ValueError, match=message):
                partition()

    @pytest.mark.parametrize("missing", [None, float("nan")])
    def test_missing_values(self, missing):
        dataset = Dataset.from_dict({"label": [1.0, missing, 2.0, missing]})
        with pytest.raises(ValueError, match=r"Column 'label' has no value in 2 of 4 rows.*remove them"):
            natural_partition(dataset, "label")

    def test_nested_column(self):
        with pytest.raises(ValueError, match=r"Column 'label' has the nested type .*pass a column of strings"):
            dirichlet_partition(make_dataset([["a"], ["b"]]), 2, 1.0, "label")

    @pytest.mark.parametrize(
        "partition",
        [lambda dataset: natural_partition(dataset, "label"), *(lambda d, p=p: p(d, 0) for p in ARTIFICIAL.values())],
        ids=["natural", *ARTIFICIAL],
    )
    def test_empty_dataset(self, partition):
        with pytest.raises(ValueError, match=r"dataset is empty, .* pass a dataset with at least one row"):
            partition(make_dataset([]))

    @pytest.mark.parametrize(
        ("num_clients", "message"),
        [
            (0, "`num_clients` is 0, .* pass a number from 1 to the number of rows, 1000"),
            (-1, "`num_clients` is -1"),
            (1001, "`num_clients` is 1001, but the dataset has only 1000 rows, .* pass 1000 or less"),
        ],
    )
    def test_number_of_clients(self, dataset, num_clients, message):
        for partition in (
            lambda: iid_partition(dataset, num_clients),
            lambda: quantity_skew_partition(dataset, num_clients, 1.0),
            lambda: dirichlet_partition(dataset, num_clients, 1.0, "label"),
            lambda: pathological_partition(dataset, num_clients, 1, "label"),
        ):
            with pytest.raises(ValueError, match=message):
                partition()

    @pytest.mark.parametrize("alpha", [0, -0.5, float("nan"), float("inf")])
    def test_alpha(self, dataset, alpha):
        with pytest.raises(ValueError, match=f"`alpha` is {alpha}, .* finite number above 0"):
            dirichlet_partition(dataset, 2, alpha, "label")
        with pytest.raises(ValueError, match=f"`alpha` is {alpha}, .* finite number above 0"):
            quantity_skew_partition(dataset, 2, alpha)

    def test_min_examples_below_one(self, dataset):
        with pytest.raises(ValueError, match=r"`min_examples` is 0, .* pass 1 or more"):
            dirichlet_partition(dataset, 2, 1.0, "label", min_examples=0)

    def test_more_examples_than_rows(self, dataset):
        with pytest.raises(ValueError, match=r"11 clients with at least 91 examples each need 1001 rows, .* has 1000"):
            quantity_skew_partition(dataset, 11, 1.0, min_examples=91)

    def test_no_draw_is_good_enough(self, dataset):
        # Only a split into exactly equal parts would do.
        with pytest.raises(ValueError, match=r"In 100 draws .* best draw had \d+\. Raise `alpha`, lower") as refusal:
            dirichlet_partition(dataset, 10, 1.0, "label", min_examples=100)
        # The best of the 100 draws, counted by hand.
        generator = np.random.default_rng(np.random.SeedSequence(0))
        draws = [
            [largest_remainder((100 * generator.dirichlet([1.0] * 10)).tolist()) for _ in range(10)]
            for _ in range(100)
        ]
        best = max(min(sum(column) for column in zip(*draw, strict=True)) for draw in draws)
        assert f"best draw had {best}." in str(refusal.value)

    def test_too_few_classes_in_all(self, dataset):
        with pytest.raises(ValueError, match=r"3 clients with 3 classes each hold at most 9 of the 10 classes.*raise"):
            pathological_partition(dataset, 3, 3, "label")

    def test_more_classes_per_client_than_classes(self, dataset):
        with pytest.raises(ValueError, match=r"`classes_per_client` is 11, but column 'label' has only 10 .* pass 10"):
            pathological_partition(dataset, 3, 11, "label")

    def test_no_classes_per_client(self, dataset):
        with pytest.raises(ValueError, match=r"`classes_per_client` is 0, .* pass a number from 1"):
            pathological_partition(dataset, 3, 0, "label")

    def test_class_with_fewer_rows_than_clients(self):
        dataset = make_dataset(["common"] * 50 + ["rare"] * 3)
        with pytest.raises(ValueError, match=r"Class 'rare' of column 'label' has 3 rows, but 4 clients .* lower"):
            pathological_partition(dataset, 4, 2, "label")
        check_exact(pathological_partition(dataset, 3, 2, "label"), dataset)

    def test_negative_seed(self, dataset):
        with pytest.raises(ValueError, match=r"`seed` is -1, .* pass 0 or more"):
            iid_partition(dataset, 2, seed=-1)

    def test_no_clients(self):
        with pytest.raises(ValueError, match="No clients were given"):
            partition_counts({}, "label")
        with pytest.raises(ValueError, match="No clients were given"):
            partition_summary({})
