# %% [markdown]
# # Five calls: load, annotate, fit, predict, measure
#
# Which reward model ranks answers better, Bradley-Terry or a classifier, and from which pairs? The data are made here,
# in a temporary folder, with a reward that is known: a function of the embedding, an offset of the prompt, and noise.
# For data of your own leave that cell out and set `EMBD_REPO_DIR`; docs/api.md has every argument.
#
# The cells run as a script too: `python examples/five_calls.py`, in seconds.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np

# a script finds the library beside its folder; a notebook is run from the repository, or finds it installed
sys.path.insert(
    0, str(Path(globals().get("__file__", "examples/five_calls.py")).resolve().parents[1])
)

from rewardlib import BT_MLP, CLF_MLP, calc_bon, calc_spearmanr, load_embd_data, pair_annotate
from rewardlib.measures import ranking

# %% [markdown]
# ## Data whose reward is known, as published files
# `embd_{gen}_{embed}_{task}_{split}.npy` (N, K, D) and `reward_...` (N, K, 1).


# %%
def write_data(folder, n_prompts, n_responses, split, rng, n_dimensions=32):
    """Half of the reward's variance is an offset of the prompt and noise, which no embedding shows."""
    prompt = rng.standard_normal((n_prompts, 1, n_dimensions))
    embeddings = prompt + rng.standard_normal((n_prompts, n_responses, n_dimensions))
    signal = np.tanh(embeddings[:, :, 0] + embeddings[:, :, 1]) + 0.5 * embeddings[:, :, 2]
    offset, noise = (
        rng.standard_normal((n_prompts, 1)),
        rng.standard_normal((n_prompts, n_responses)),
    )
    rewards = signal + signal.std() * (offset + noise) / np.sqrt(2)
    name = f"Gemma2b-sft_Gemma2b_Harmless_{split}.npy"
    np.save(folder / f"embd_{name}", embeddings.astype(np.float16))
    np.save(folder / f"reward_{name}", rewards[:, :, None].astype(np.float32))


rng = np.random.default_rng(0)
temporary = tempfile.TemporaryDirectory()
write_data(Path(temporary.name), 400, 10, "train", rng)
write_data(Path(temporary.name), 200, 50, "test", rng)

# %% [markdown]
# ## 1. Load: memory-mapped, nothing is read yet

# %%
names = {
    "task": "Harmless",
    "res_gen_model": "Gemma2b-sft",
    "embed_model": "Gemma2b",
    "root": temporary.name,
}
train_embeddings, train_rewards = load_embd_data(**names, split="train")  # (N, K, D), (N, K, 1)
test_embeddings, test_rewards = load_embd_data(**names, split="test")

# %% [markdown]
# ## 2. to 5. Annotate, fit, predict, measure
# Every row has the same number of labels. `groups` keeps the pairs of a prompt together where an epoch is chosen.

# %%
print()
results = []
for strategy in ("random", "diverse", "similar", "cross_prompt"):
    annotated = pair_annotate(
        train_embeddings, train_rewards, annotation_quality=3, pair_strategy=strategy, rng=1
    )
    comparisons, labels = annotated  # (M, 2, D), (M,)
    for reward_model in (BT_MLP(hidden=(128, 64), epochs=4), CLF_MLP(hidden=(128, 64), epochs=4)):
        reward_model.fit(comparisons, labels, groups=annotated.groups)
        predictions = reward_model.predict(test_embeddings)  # (N, K, 1)
        rho, bon = (
            calc_spearmanr(predictions, test_rewards),
            calc_bon(predictions, test_rewards, N=10),
        )
        results.append(
            (strategy, type(reward_model).__name__, annotated.pairs.label_error, rho, bon)
        )

# %% [markdown]
# ## The table, with what no model can beat and what any should

# %%
chance = np.random.default_rng(2).random(test_rewards.shape)
for name, scores in (("random scorer", chance), ("oracle", test_rewards)):
    results.append(
        ("-", name, 0.0, calc_spearmanr(scores, test_rewards), calc_bon(scores, test_rewards, N=10))
    )
print("\npairs         reward model   label error  Spearman  best of 10")
for strategy, name, error, rho, bon in results:
    print(f"{strategy:12s}  {name:13s}  {error:11.3f}  {rho:8.3f}  {bon:10.3f}")

# %% [markdown]
# ## Why a classifier's logit is a reward
# A pair that it orders wrongly holds a response that it classes wrongly. So the order error is at most the sum of the
# two classification errors; see docs/api.md for what that says, and what it does not.

# %%
index, better = pair_annotate(
    test_embeddings, test_rewards, -1, pair_strategy="diverse", return_index=True
)
found = ranking.order_consistency(predictions.reshape(-1)[index], better)
print(
    f"order error {found['order_error']:.3f} <= bound {found['bound']:.3f} on diverse pairs of the test prompts"
)
temporary.cleanup()
