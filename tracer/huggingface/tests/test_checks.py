"""The checks that decide what is captured, refused or stored without projection, on the cases that tell models apart.

Needs NumPy and nothing of PyTorch, so that CI runs it: python3 tests/test_checks.py
"""

import importlib.util
import pathlib
import unittest

import numpy as np

_SPECIFICATION = importlib.util.spec_from_file_location(
    "checks", pathlib.Path(__file__).resolve().parents[1] / "kvtrace" / "checks.py")
checks = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(checks)


def seen(queries, keys, window=0):
    """What causal attention shows, [1, n, m]."""
    behind = np.asarray(queries)[:, None] - np.asarray(keys)
    return ((behind >= 0) & ((behind < window) if window else True))[None]


def fault(mask, first=0, first_key=0, window=0, chunk=0):
    count, length = mask.shape[1:]
    return checks.mask_fault(mask, first + np.arange(count)[:, None], first_key + np.arange(length), window, chunk)


class Masks(unittest.TestCase):
    def test_causal_ones_are_right(self):
        whole = seen(range(40), range(40))
        self.assertIsNone(fault(whole))
        self.assertIsNone(fault(np.repeat(whole, 4, 0)))
        self.assertIsNone(fault(seen(range(40), range(40), 16), window=16))
        # A piece of the prompt, and a token alone, over the keys that a window's cache holds.
        self.assertIsNone(fault(seen(range(30, 40), range(15, 40), 16), first=30, first_key=15, window=16))
        self.assertIsNone(fault(seen([50], range(35, 51), 16), first=50, first_key=35, window=16))

    def test_float_ones_are_right_where_they_hide_all_or_nothing(self):
        for hidden in (-1e4, -1e9, np.finfo(np.float32).min, -np.inf):
            self.assertIsNone(fault(np.where(seen(range(9), range(9)), 0, hidden)))
        self.assertIsNone(fault(np.where(seen(range(9), range(9)), 0, np.finfo(np.float16).min).astype(np.float16)))

    def test_biases_are_no_masks(self):
        """Those above -1 too: a logit that is half a unit lower is another."""
        for bias in (-0.5, -3.0, 0.25):
            mask = np.where(seen(range(9), range(9)), 0.0, -np.inf)
            mask[0, 5, 2] = bias
            self.assertIn("adds to logits", fault(mask))

    def test_every_row_is_looked_at(self):
        """The first and the last are as they should be."""
        mask = seen(range(40), range(40))
        mask[0, 11, 14] = True  # an image's token sees a later one of the same image
        self.assertIn("shows position 14 to the query at 11", fault(mask))
        mask = seen(range(40), range(40))
        mask[0, 20, 7] = False
        self.assertIn("hides positions between those that it shows", fault(mask))

    def test_every_head_is_looked_at(self):
        mask = np.repeat(seen(range(40), range(40)), 4, 0)
        mask[2] = seen(range(40), range(40), 8)[0]
        self.assertIn("different positions to different heads", fault(mask))

    def test_windows_chunks_and_padding_are_told_apart(self):
        self.assertIn("the last 24 positions, a sliding window", fault(seen(range(40), range(40), 24)))
        self.assertIn("the last 12 positions, a sliding window", fault(seen(range(40), range(40), 12), window=16))
        positions = np.arange(40)
        chunks = seen(positions, positions) & (positions[:, None] // 16 == positions // 16)
        self.assertIn("chunks of 16 positions", fault(chunks))
        self.assertIn("chunks of 16 positions", fault(chunks[:, 20:], first=20))
        self.assertIsNone(fault(chunks, chunk=16))
        self.assertIsNone(fault(chunks[:, 39:, 25:], first=39, first_key=25, chunk=16))
        self.assertIn("shows position 0 to the query at 8, which is outside its chunk of 8", fault(chunks, chunk=8))
        self.assertIn("shows position 0 to the query at 16, which is outside its sliding window of 16",
                      fault(seen(range(40), range(40)), window=16))
        self.assertIn("hides the positions before 3", fault(seen(positions, positions) & (positions >= 3)))
        self.assertIn("hides the positions before 32 from the query at 39", fault(chunks[:, 39:], first=39))

    def test_window_that_shows_one_less_is_told(self):
        """As transformers 5.1.0 does for the tokens after a prompt in pieces."""
        self.assertIn("the last 13 positions to the query at 37, one less than its sliding window",
                      fault(seen([37], range(24, 38), 13), first=37, first_key=24, window=14))

    def test_no_mask_is_what_the_implementation_makes_of_it(self):
        self.assertIsNone(checks.no_mask_fault("sdpa", True, 40, 40, 0))
        self.assertIsNone(checks.no_mask_fault("sdpa", True, 40, 40, 64))
        self.assertIsNone(checks.no_mask_fault("eager", False, 1, 40, 0))
        self.assertIsNone(checks.no_mask_fault("flash_attention_2", True, 40, 60, 16))
        self.assertIn("not causal", checks.no_mask_fault("flash_attention_2", False, 40, 40, 0))
        self.assertIn("see later positions", checks.no_mask_fault("eager", True, 40, 40, 0))
        self.assertIn("see later positions", checks.no_mask_fault("sdpa", True, 10, 40, 0))
        self.assertIn("outside its sliding window of 16", checks.no_mask_fault("sdpa", True, 40, 40, 16))
        self.assertIn("outside its chunk of 16", checks.no_mask_fault("sdpa", True, 40, 40, 0, 16))
        self.assertIn("outside its chunk of 16", checks.no_mask_fault("flash_attention_2", True, 1, 16, 0, 16, 40))
        self.assertIsNone(checks.no_mask_fault("sdpa", True, 16, 16, 0, 16))
        self.assertIsNone(checks.no_mask_fault("eager", True, 1, 9, 0, 16, 40))
        self.assertIn("outside its sliding window of 16", checks.no_mask_fault("eager", True, 1, 40, 16))


class Caches(unittest.TestCase):
    def test_grouped_query_attention_is_right(self):
        self.assertIsNone(checks.cache_fault(((2, 16), (2, 16)), ((2, 16), (2, 16)), 40, 40))
        self.assertIsNone(checks.cache_fault(((1, 16), (1, 16)), ((1, 16), (1, 16)), 40, 40))

    def test_latent_rows_are_told(self):
        """Though attention sees the shape of heads with keys and values of one width."""
        self.assertIn("one latent row of 24 and 8", checks.cache_fault(((4, 16), (4, 16)), ((1, 24), (1, 8)), 40, 40))

    def test_copied_heads_are_told(self):
        self.assertIn("4 heads", checks.cache_fault(((4, 16), (4, 16)), ((2, 16), (2, 16)), 40, 40))

    def test_missing_positions_are_told(self):
        self.assertIn("the cache holds 23", checks.cache_fault(((2, 16), (2, 16)), ((2, 16), (2, 16)), 40, 23))


class Lengths(unittest.TestCase):
    def test_one_run_is_right(self):
        self.assertIsNone(checks.length_fault(0, 40, 40, 0, None))
        self.assertIsNone(checks.length_fault(40, 1, 41, 0, None))
        self.assertIsNone(checks.length_fault(40, 1, 16, 16, None))
        self.assertIsNone(checks.length_fault(40, 10, 25, 16, None))

    def test_reasons_are_the_true_ones(self):
        self.assertIn("second run", checks.length_fault(40, 40, 40, 0, None))
        self.assertIn("second run", checks.length_fault(40, 1, 1, 0, 32))
        self.assertIn("beyond 44 tokens (longrope)", checks.length_fault(44, 45, 45, 0, 44))
        self.assertIn("3 of the tokens that ran were taken out", checks.length_fault(45, 5, 47, 0, None))
        self.assertIn("default cache", checks.length_fault(40, 1, 128, 0, None))


class Positions(unittest.TestCase):
    def test_consecutive_pieces_are_right(self):
        self.assertIsNone(checks.positions_fault(range(256)))
        self.assertIsNone(checks.positions_fault(range(256, 512), 255))
        self.assertIsNone(checks.positions_fault([2, 3, 4]))  # some begin behind the number of padding

    def test_pieces_at_the_prompts_end_are_refused(self):
        """As transformers 5.2.0 places the pieces of 256 of 600 tokens."""
        self.assertIn("position 344 comes after 599", checks.positions_fault(range(344, 600), 599))
        self.assertIn("position 0 comes after 2", checks.positions_fault([0, 1, 2, 0, 1]))


class Options(unittest.TestCase):
    def test_known_ones_are_right(self):
        self.assertIsNone(checks.options_fault({"scaling": 0.1, "dropout": 0.0, "sliding_window": 16, "softcap": 30.0,
                                                "position_ids": object(), "indices": None, "s_aux": object()}))

    def test_sparse_attention_is_told(self):
        for name in ("indices", "block_indices"):
            self.assertIn("that the model chose", checks.options_fault({"scaling": 0.1, name: object()}))
        self.assertIn("packed", checks.options_fault({"cu_seq_lens_q": object()}))

    def test_unknown_ones_are_told(self):
        self.assertIn("is given temperature_map", checks.options_fault({"temperature_map": 1}))


class Layers(unittest.TestCase):
    def test_all_seen_is_right(self):
        self.assertIsNone(checks.unseen_fault([40, 40], [{"Attention"}, {"Attention"}]))
        self.assertEqual(checks.unattended([40, 40], [{"Attention"}, {"Attention"}], {"Attention"}), [])

    def test_run_that_is_cut_short_is_no_matter_of_layers(self):
        self.assertEqual(checks.unattended([40, 0], [{"Attention"}, {"Attention"}], {"Attention"}), [])

    def test_layers_without_attention_are_told(self):
        kinds = [{"Mixer"}, {"Attention"}, {"Mixer"}, {"Attention"}]
        self.assertIsNone(checks.unseen_fault([0, 40, 0, 40], kinds))
        self.assertEqual(checks.unattended([0, 40, 0, 40], kinds, {"Attention"}), [0, 2])
        # Layers that share their attention have it in none of them.
        self.assertEqual(checks.unattended([0, 40], [{"Mixer"}, {"Mixer"}], {"Attention"}), [0])
        self.assertEqual(checks.unattended([0, 9], [set(), {"Attention"}], {"Attention"}), [0])

    def test_those_that_fill_the_cache_attend_in_their_own_way(self):
        self.assertIsNone(checks.unseen_cache_fault([None, np.zeros((1, 2, 0, 8))], {"Mixer"}))
        self.assertIn("keys are in the cache, but its attention (OwnAttention)",
                      checks.unseen_cache_fault([None, np.zeros((1, 2, 5, 8))], {"OwnAttention"}))

    def test_those_without_any_are_told(self):
        self.assertIn("it has no attention (its layers have Mixer)", checks.unseen_fault([0, 0], [{"Mixer"}] * 2))
        self.assertIn("it has no attention, and", checks.unseen_fault([0], [set()]))

    def test_parts_say_more_than_masks(self):
        mask, length = "its mask hides positions between those that it shows", "attention reads 50 keys after 40 tokens"
        self.assertEqual(checks.parts_fault({"Attention", "Linear"}, mask), mask)
        self.assertIn("that the model chooses (SomeIndexer)", checks.parts_fault({"Attention", "SomeIndexer"}, mask))
        self.assertIn("several tokens together", checks.parts_fault({"SomeIndexer", "SomeCompressor"}, length))
        self.assertIn("such as an image's", checks.parts_fault({"TextCrossAttention"}, length))
        padding = "its mask hides the positions before 3"
        self.assertEqual(checks.parts_fault({"SomeIndexer"}, padding), padding)

    def test_attention_of_ones_own_is_told(self):
        self.assertIn("they are FalconAttention", checks.unseen_fault([0, 0], [{"FalconAttention"}] * 2))


if __name__ == "__main__":
    unittest.main()
