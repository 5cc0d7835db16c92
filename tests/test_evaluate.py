"""python -m selfnpo.evaluate: what it will do, and which models it judges."""

import pytest
from diffusers import DDIMScheduler, DiTTransformer2DModel

from commands import call
from selfnpo.demo import evaluation
from selfnpo.demo.config import EvaluateConfig, plan
from selfnpo.models import DEMO_FOLDER


@pytest.mark.parametrize(
    "family", ["stable_diffusion", "stable_diffusion_xl", "cogvideox", "unconditional", "class_conditional"]
)
def test_other_models_than_digits_are_refused_at_once(models, tmp_path, capsys, monkeypatch, family):
    monkeypatch.setattr("selfnpo.models.loading.load_pretrained", None)
    assert call("evaluate", "--pretrained_model_name_or_path", models(family), "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {models(family)} is a ")
    assert "expected the demo, or a base made with python -m selfnpo.demo.base" in error
    assert "python -m selfnpo.sample --output_dir" in error
    assert list(tmp_path.iterdir()) == []


def test_bases_of_digits_of_another_size_are_judged(tmp_path, monkeypatch):
    """Which lie on pixels and have ten classes, whatever their width."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base" / "transformer")
    DDIMScheduler.from_pretrained(DEMO_FOLDER / "scheduler").save_pretrained(tmp_path / "base" / "scheduler")
    monkeypatch.setattr("selfnpo.demo.metrics.Metrics", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call("evaluate", "--pretrained_model_name_or_path", tmp_path / "base", "--output_dir", tmp_path / "out") == 130


def test_a_given_negative_comes_without_baselines():
    assert EvaluateConfig().baselines == ("random", "early", "shuffled")
    assert EvaluateConfig(negative=DEMO_FOLDER).baselines == ()
    assert EvaluateConfig(negative=DEMO_FOLDER, arms=("self-npo", "early")).baselines == ("early",)


def test_what_will_be_done_is_said_before():
    assert plan(EvaluateConfig()) == (
        "to train: 12 fine-tunes of 2000 steps x 128 samples (self-npo, shuffled); 1 early base of 600 steps; 3 judges\n"
        "to judge: 96 sets of 5000 samples (none, cfg, self-npo, random, early, shuffled; 6 seeds, guidance_scale 1.5 2 3)"
    )
    assert plan(EvaluateConfig(negative=DEMO_FOLDER, seeds=(1, 2), guidance_scales=(2.0,))) == (
        "to train: no negative; 3 judges\nto judge: 6 sets of 5000 samples (none, cfg, self-npo; 2 seeds, guidance_scale 2)"
    )


def test_the_plan_counts_what_is_sampled(tmp_path, monkeypatch, capsys):
    """With a given negative nothing is trained, and as many sets are sampled as were announced."""
    monkeypatch.setattr("selfnpo.demo.experiment.fine_tune", None)
    sampled = []
    real = evaluation.ddim_sample
    monkeypatch.setattr(evaluation, "ddim_sample", lambda *args: sampled.append(args) or real(*args))
    negative = DEMO_FOLDER / "transformer"
    flags = ("--negative", negative, "--num_samples", 200, "--seeds", 1, 2, "--guidance_scales", 2, 3)
    assert call("evaluate", *flags, "--output_dir", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "to train: no negative; 3 judges\nto judge: 10 sets of 200 samples" in out.partition("#")[0]
    assert len(sampled) == 10
    assert "| guidance_scale = 3 |" in out
