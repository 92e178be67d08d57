# %% [markdown]
# # Five calls: load, annotate, fit, predict, measure
#
# Which reward model ranks responses better, Bradley-Terry or a classifier, and which pairs should
# it learn from? The data are made here, in a temporary folder, so that their reward is known: a
# function of the embedding, plus an offset of the prompt, plus noise. For data of your own leave
# that cell out and set `EMBD_REPO_DIR`; docs/api.md explains every argument.
#
# The cells also run as a script, in seconds: `python examples/five_calls.py`.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np

# A script finds the library in the folder above its own. A notebook has no __file__: run it in the
# repository, or install the library.
sys.path.insert(
    0, str(Path(globals().get("__file__", "examples/five_calls.py")).resolve().parents[1])
)

from rewardlib import BT_MLP, CLF_MLP, calc_bon, calc_spearmanr, load_embd_data, pair_annotate
from rewardlib.measures import ranking

# %% [markdown]
# ## Data whose reward is known, in a published format
# `embd_{gen}_{embed}_{task}_{split}.npy` (N, K, D) and `reward_...` (N, K, 1): K responses to each
# of N prompts, D dimensions.


# %%
def write_data(folder, n_prompts, n_responses, split, rng, n_dimensions=32):
    """Write embeddings and rewards; half of the rewards' variance no embedding can explain.

    That half is the offset of the prompt and the noise, in equal shares.
    """
    prompts = rng.standard_normal((n_prompts, 1, n_dimensions))
    embeddings = prompts + rng.standard_normal((n_prompts, n_responses, n_dimensions))
    signal = np.tanh(embeddings[:, :, 0] + embeddings[:, :, 1]) + 0.5 * embeddings[:, :, 2]
    offset = rng.standard_normal((n_prompts, 1))
    noise = rng.standard_normal((n_prompts, n_responses))
    rewards = signal + signal.std() * (offset + noise) / np.sqrt(2)
    name = f"Gemma2b-sft_Gemma2b_Harmless_{split}.npy"
    np.save(folder / f"embd_{name}", embeddings.astype(np.float16))
    np.save(folder / f"reward_{name}", rewards[:, :, None].astype(np.float32))


rng = np.random.default_rng(0)
temporary = tempfile.TemporaryDirectory()
write_data(Path(temporary.name), 400, 10, "train", rng)
write_data(Path(temporary.name), 200, 50, "test", rng)

# %% [markdown]
# ## 1. Load
# The arrays are memory-mapped: nothing is read until it is used.

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
# Every row of the table has the same number of labels. `groups` keeps all pairs of a prompt on one
# side when pairs are held out to choose the best epoch.

# %%
print()
results = []
for strategy in ("random", "diverse", "similar", "cross_prompt"):
    annotated = pair_annotate(
        train_embeddings, train_rewards, annotation_quality=3, pair_strategy=strategy, rng=1
    )
    comparisons, labels = annotated  # (M, 2, D), (M,)
    label_error = annotated.pairs.label_error
    for reward_model in (BT_MLP(hidden=(128, 64), epochs=4), CLF_MLP(hidden=(128, 64), epochs=4)):
        reward_model.fit(comparisons, labels, groups=annotated.groups)
        predictions = reward_model.predict(test_embeddings)  # (N, K, 1)
        rho = calc_spearmanr(predictions, test_rewards)
        best_of_10 = calc_bon(predictions, test_rewards, N=10)
        results.append((strategy, type(reward_model).__name__, label_error, rho, best_of_10))

# %% [markdown]
# ## The table
# Every model should beat the random scorer; none can beat the oracle, which scores by the reward.

# %%
chance = np.random.default_rng(2).random(test_rewards.shape)
for name, scores in (("random scorer", chance), ("oracle", test_rewards)):
    rho = calc_spearmanr(scores, test_rewards)
    results.append(("-", name, 0.0, rho, calc_bon(scores, test_rewards, N=10)))
print("\npairs         reward model   label error  Spearman  best of 10")
for strategy, name, label_error, rho, best_of_10 in results:
    print(f"{strategy:12s}  {name:13s}  {label_error:11.3f}  {rho:8.3f}  {best_of_10:10.3f}")

# %% [markdown]
# ## Why a classifier's logit is a reward
# Every pair that a classifier orders wrongly contains a response that it classifies wrongly. So the
# order error is at most the sum of the two classification errors; docs/api.md explains what this
# bound says, and what it does not say.

# %%
index, better = pair_annotate(
    test_embeddings, test_rewards, -1, pair_strategy="diverse", return_index=True
)
errors = ranking.order_consistency(predictions.reshape(-1)[index], better)
print(
    f"order error {errors['order_error']:.3f} <= bound {errors['bound']:.3f} "
    "on diverse pairs of the test prompts"
)
temporary.cleanup()
