"""The same samples step after step."""

import torch

from selfnpo.training.trainer import Trainer


def losses_on_a_fixed_batch(trainer: Trainer, steps: int) -> list[float]:
    """Of fresh rollouts, drawn once."""
    student, losses = trainer.state.student, []
    with torch.no_grad():
        batch = trainer.state.rollout.draw(student.reference, torch.tensor(0))
    asked = trainer.step.objective.jump(batch, torch.tensor(0))
    for _ in range(steps):
        with student.training():
            output = trainer.base.predict(student.model, asked.sample, asked.timesteps, asked.condition)
            loss = trainer.step.objective.loss(asked, output, batch.target)
            loss.backward()
        trainer.state.optimizer.step()
        losses.append(loss.item())
    return losses
