"""Bugs of losses, optimizers and training steps."""

from __future__ import annotations

from parity.museum.exhibit import Exhibit, edit
from resnet_func import losses, optim
from resnet_func.optim import first_order
from resnet_func.train import step

OPTIMIZERS = "properties/optimizers-are-torchs"

EXHIBITS = [
    Exhibit(
        "smoothing-for-the-others-alone",
        "label smoothing gives its share to the other classes, not to all",
        "reimplementations of label smoothing",
        "properties/smoothing-is-a-mixture-of-targets",
        edit(
            losses._smoothed_cross_entropy,
            (
                "label_smoothing=smoothing",
                "label_smoothing=min(smoothing * logits.shape[1] / (logits.shape[1] - 1), 1.0)",
            ),
        ),
    ),
    Exhibit(
        "dampened-momentum",
        "the momentum buffer averages gradients instead of adding them up",
        "reimplementations of momentum as a moving average",
        OPTIMIZERS,
        edit(
            first_order._sgd_move, ("* momentum_of(p) + g\n", "* momentum_of(p) + (1 - rule.momentum) * g\n")
        ),
    ),
    Exhibit(
        "learning-rate-in-the-buffer",
        "the momentum buffer holds steps, so that a drop of the learning rate comes late",
        "Sutskever et al. 2013 and others, says torch.optim.SGD's documentation",
        OPTIMIZERS,
        edit(
            first_order._sgd_move,
            (
                "    # All of a leaf",
                "    now = rule.schedule(to_float64(opt_state.step))\n"
                "    before = rule.schedule(to_float64((opt_state.step - 1).clamp(min=0)))\n"
                "    # All of a leaf",
            ),
            ("* momentum_of(p) + g\n", "* (rule.momentum * (before / now).to(g.dtype)) + g\n"),
        ),
    ),
    Exhibit(
        "nesterov-looks-back",
        "Nesterov's step adds the old buffer, not the new one",
        "reimplementations of Nesterov momentum",
        OPTIMIZERS,
        edit(
            first_order._sgd_move,
            ("_add_scaled(g, b, momentum_of(p))", "_add_scaled(g, buffer[0], momentum_of(p))"),
        ),
    ),
    Exhibit(
        "schedule-one-step-early",
        "the first update sees the learning rate of step 1",
        "a scheduler stepped before the optimizer, which torch warns of",
        OPTIMIZERS,
        edit(
            first_order._sgd_move,
            (
                "schedule(to_float64(opt_state.step))",
                "schedule(to_float64(opt_state.step + 1))",
            ),
        ),
    ),
    Exhibit(
        "adamw-with-l2",
        "AdamW adds the decay to the gradient",
        "Adam before Loshchilov and Hutter 2019",
        OPTIMIZERS,
        edit(optim.adamw, ("decoupled=True", "decoupled=False")),
    ),
    Exhibit(
        "adam-with-decoupled-decay",
        "Adam's decay is decoupled",
        "AdamW under the name of Adam",
        OPTIMIZERS,
        edit(optim.adam, ("decoupled=False", "decoupled=True")),
    ),
    Exhibit(
        "epsilon-hat",
        "Adam adds epsilon before the bias correction of the second moment",
        'TensorFlow and Keras: "epsilon hat" of Kingma and Ba, before section 2.1',
        OPTIMIZERS,
        edit(
            first_order._adam_deltas,
            ("(root / root2(p) + eps_of(p))", "((root + eps_of(p)) / root2(p))"),
        ),
    ),
    Exhibit(
        "epsilon-under-the-root",
        "Adam adds epsilon to the second moment, not to its root",
        "reimplementations; optax has it as eps_root",
        OPTIMIZERS,
        edit(
            first_order._adam_deltas,
            ("(root / root2(p) + eps_of(p))", "((v + eps_of(p)).sqrt() / root2(p))"),
        ),
    ),
    Exhibit(
        "adam-without-bias-correction",
        "Adam's moments are not corrected for their start at zero",
        "BERT's optimizer, and BertAdam of pytorch-pretrained-bert",
        OPTIMIZERS,
        edit(
            first_order._adam_deltas,
            ("1 - beta1**count", "1"),
            ("1 - beta2**count", "torch.ones_like(count)"),
        ),
    ),
    Exhibit(
        "accumulated-gradients-alias",
        "the first micro-batch's gradient is in the second's too, and counts twice",
        "loops that keep p.grad, into which the next backward pass adds",
        "properties/microbatches-change-no-training-step",
        edit(step._TrainStep.__call__, ("_add_wide, total, part", "lambda t, p: t + (t + p), total, part")),
    ),
    Exhibit(
        "mean-of-unequal-means",
        "micro-batches of unequal size have equal weight",
        "transformers' Trainer until its pull request 34191",
        "properties/uneven-pieces-change-no-training-step",
        edit(
            step._TrainStep.objective,
            ("widen(losses).sum() / batch_size", "losses.mean() / self.microbatches"),
        ),
    ),
    Exhibit(
        "statistics-of-the-last-piece",
        "each micro-batch starts from the running statistics before the step",
        "functional training loops that thread parameters and forget the state",
        "properties/every-piece-moves-the-running-statistics",
        edit(
            step._TrainStep.__call__,
            (" state=state, x=x_part", " state=train_state.state, x=x_part"),
        ),
    ),
    Exhibit(
        "averages-without-statistics",
        "the moving average keeps the running statistics it started with",
        "torch's AveragedModel, unless asked with use_buffers=True, averages parameters alone",
        "properties/averages-follow-parameters-and-statistics",
        edit(step._TrainStep.__call__, ("ema_state = ema(ema_state, state, decay)", "pass")),
    ),
    Exhibit(
        "average-without-warm-up",
        "the moving average has its full decay from the first step on",
        "reimplementations of moving averages",
        "properties/averages-follow-parameters-and-statistics",
        edit(
            step._TrainStep.__call__,
            (
                "torch.clamp((1 + steps) / (10 + steps), max=self.ema_decay)",
                "torch.full_like(steps, self.ema_decay)",
            ),
        ),
    ),
]
