"""The Trainer: Hugging Face's loop around a step that wastes nothing.

One batch of the Trainer is one optimizer step of one rank.  Its loss is the sum over supervised
tokens divided by their number in the whole step, over all micro-batches and ranks, so that neither
GAS nor the number of processes changes the result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from tinyllm.base import plain_model
from tinyllm.batches import Batch, collate, fill_up, model_inputs, nothing_to_learn, split, targets
from tinyllm.errors import AlreadyTold, UserError
from tinyllm.examples import Examples
from tinyllm.fused_layers import all_in_strips, bytes_of_packing, pack_projections
from tinyllm.fused_model import parts_stay
from tinyllm.head_loss import frozen_head_loss, has_plain_frozen_head
from tinyllm.loraplus import loraplus_optimizer
from tinyllm.micro_batches import filled_up_to, most_tokens, whole_steps
from tinyllm.neftune import Neftune
from tinyllm.packing_check import choose_packing
from tinyllm.rank_share import share_rows
from tinyllm.row_search import ids_of, rows_text
from tinyllm.saving import SavingTrainer
from tinyllm.settings import SftArguments
from tinyllm.zero_grad import quick_zero_grad

NO_GRADIENT = (
    "step 1: every gradient is zero, so nothing would be learned; is a part of the model frozen that "
    "leads to the adapter, or does gradient checkpointing cut it off (try --gradient_checkpointing "
    "False)?"
)


class SftTrainer(SavingTrainer):
    """Trains a causal model (with or without LoRA) on ragged batches.

    Args:
        model: a causal language model or a PeftModel around one.
        args: the user's settings; MBS × GAS examples make one optimizer step.
        max_length: most tokens of an example, so MBS × max_length bounds a micro-batch.
        loraplus_lr_ratio: learning rate of the B matrices over that of A (LoRA+); 0 for the same.
    """

    def __init__(
        self, model, args: SftArguments, train_dataset: Examples,
        eval_dataset: Examples | None, tokenizer, max_length: int, callbacks=None,
        loraplus_lr_ratio: float = 0.0,
    ) -> None:  # fmt: skip
        self.tokens_per_micro_batch = most_tokens(args, model, max_length)
        self.causal_model = plain_model(model)
        self.packing = choose_packing(self.causal_model)
        if self.packing.one_by_one:
            self.tokens_per_micro_batch = 1  # every example is longer, and gets a row of its own
        self.loraplus_lr_ratio = loraplus_lr_ratio
        # autocast is a wrapper around the whole forward, which this path goes past
        autocast = args.bf16 or args.fp16
        plain = has_plain_frozen_head(self.causal_model) and not autocast
        self.chunked_loss = args.chunked_loss and plain
        self.packs_weights = args.device.type == "cpu" and not autocast
        self.eval_multiple = filled_up_to(args, self.causal_model) if self.packing.kernel else 1
        strips = self.packs_weights and all_in_strips(self.causal_model)
        self.multiple = 1 if strips else self.eval_multiple
        self.asked = args  # as the user wrote them; self.args counts whole steps
        super().__init__(
            model=model,
            args=whole_steps(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.find_rows: Callable[[list[bytes]], list[str]] = lambda ids: []
        self.last_batch: Batch = {}
        self.num_counted: int | None = None
        self.trained: list[torch.nn.Parameter] = []
        self.neftune = None
        if args.neftune_noise_alpha:
            self.neftune_noise_alpha = None  # transformers' own hook knows no packed rows
            embeddings = self.causal_model.get_input_embeddings()
            self.neftune = Neftune(embeddings, args.neftune_noise_alpha)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As ever, or with LoRA+'s two learning rates."""
        self.trained = []
        if self.optimizer is None and self.loraplus_lr_ratio:
            self.optimizer = loraplus_optimizer(self.model, self.args, self.loraplus_lr_ratio)
        return super().create_optimizer(model)

    def floating_point_ops(self, inputs: Batch) -> int:
        """As transformers counts them, but the parameters only once."""
        if self.num_counted is None:
            self.num_counted = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self.num_counted

    def get_train_dataloader(self) -> DataLoader:
        """One batch is this rank's part of one optimizer step."""
        loader = super().get_train_dataloader()
        order = self._get_train_sampler(self.train_dataset)
        return self._share(loader, order, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """Held-out rows of this rank; together the ranks see every row once."""
        loader = super().get_eval_dataloader(eval_dataset)
        return self._share(loader, SequentialSampler(loader.dataset), self.args.eval_batch_size)

    def _share(self, loader: DataLoader, order, rows_per_rank: int) -> DataLoader:
        if self.accelerator.num_processes == 1:
            return loader
        return share_rows(loader, order, rows_per_rank, self.accelerator, self.args.data_seed)

    def training_step(self, model, inputs: Batch, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one optimizer step, in micro-batches; returns its loss ()."""
        # To tell hundreds of modules takes a millisecond; a wrapper's own flag does not follow the model's.
        if not (model.training and self.causal_model.training):
            model.train()
        batch = self._prepare_inputs(inputs)
        num_supervised = self._sum_over_ranks(len(targets(batch)[0]))
        total, micro_batches = 0.0, self._micro_batches(batch)
        for number, micro_batch in enumerate(micro_batches, 1):
            self.stop_now()
            with self._synchronised(model, last=number == len(micro_batches)):
                loss = self.sum_of_losses(model, micro_batch) / num_supervised
                # ranks' gradients are averaged, so that the sum over ranks needs this factor
                loss = loss * self.accelerator.num_processes
                self.accelerator.backward(loss, **self._backward_options())
            total = total + loss.detach()
        self._require_number(total, "loss", batch)
        self.last_batch = batch
        return total

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """As many on every rank: sharded engines exchange something in each forward and backward."""
        parts = list(split(batch, self.tokens_per_micro_batch))
        if self.accelerator.num_processes == 1:
            return parts
        number = torch.tensor([len(parts)], device=self.args.device)
        most = max(1, int(self.accelerator.gather(number).max()))
        return parts + [nothing_to_learn(batch)] * (most - len(parts))

    def _require_number(self, value, what: str, batch: Batch) -> None:
        """Stop before the weights take in what is no number, naming the rows that gave it.

        Raises:
            UserError: on the rank whose rows gave it; on the others an AlreadyTold.
        """
        broken = not math.isfinite(float(value))
        if not self._sum_over_ranks(float(broken)):
            return
        if not broken:
            raise AlreadyTold("the rows of another process gave no number")
        rows = rows_text(self.find_rows(ids_of(batch)))
        raise UserError(
            f"step {self.state.global_step + 1}: the {what} is {float(value)}, from the rows {rows}; "
            f"lower --learning_rate, or look at these rows ({self._last_good_here()})"
        )

    def _clip_grad_norm(self, model) -> torch.Tensor | float | None:
        """As ever; of a model without wrapper only what is trained, which to find takes as long again."""
        if model is not self.model:
            return super()._clip_grad_norm(model)
        if not self.trained:
            self.trained = [p for p in model.parameters() if p.requires_grad]
        if self.args.device.type != "cpu":
            return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if norm > self.args.max_grad_norm:  # else all would be multiplied by 1
            clip_grads_with_norm_(self.trained, self.args.max_grad_norm, norm)
        return norm

    def _run_epoch(self, model, *args, **kwargs) -> None:
        """As ever, with weights laid out for their products; here nothing will move or change them."""
        if self.packs_weights:
            pack_projections(self.causal_model)
        with contextlib.ExitStack() as meanwhile:
            if model is self.model:
                callbacks = self.callback_handler.callbacks
                meanwhile.enter_context(quick_zero_grad(model, self.optimizer))
                meanwhile.enter_context(parts_stay(self.causal_model, callbacks))
            super()._run_epoch(model, *args, **kwargs)

    def bytes_of_packing(self) -> int:
        """What the laid-out weights take during training; 0 where there are none."""
        return bytes_of_packing(self.causal_model) if self.packs_weights else 0

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm; it is looked at before the optimizer takes its step.

        Raises:
            UserError: it is no number, or it is zero in the very first step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return norm  # both look for overflows themselves, and pass over such a step
        self._require_number(norm, "gradient", self.last_batch)
        if self.state.global_step == 0 and not float(norm):
            raise UserError(NO_GRADIENT)
        return norm

    def _synchronised(self, model, last: bool) -> contextlib.AbstractContextManager:
        """Exchange gradients (and, with DeepSpeed, step) only after the last micro-batch."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def _backward_options(self) -> dict:
        """DeepSpeed must not divide by the accumulation steps: the loss is normalised already."""
        return {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}

    def sum_of_losses(self, model, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropy over the supervised tokens of a batch, () float32.

        The head runs only where there is something to learn: ``(num_supervised, vocabulary)``
        instead of ``(N, vocabulary)`` logits, and where it is frozen and the model is not wrapped
        (DDP and DeepSpeed must see the whole forward) only a few positions at a time.
        """
        positions, ids = targets(batch)
        batch = fill_up(batch, self.multiple if model.training else self.eval_multiple)
        inputs = model_inputs(batch, self.packing.kernel)
        if self.neftune is not None:
            self.neftune.lengths = batch["lengths"]
        if self.chunked_loss and model is self.model:
            return frozen_head_loss(self.causal_model, inputs, positions, ids)
        logits = model(**inputs, logits_to_keep=positions).logits[0]
        return F.cross_entropy(logits.float(), ids, reduction="sum")

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only=None,
        ignore_keys=None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        """Loss per supervised token over the whole held-out set, every token counted once."""
        model = self.model if self.deepspeed is None else self.model_wrapped
        model.to(self.args.device).eval()
        total, count = 0.0, 0
        # to start a loader takes a random number; training must not depend on evaluations
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in dataloader:
                self.stop_now(in_evaluation=True)
                batch = self._prepare_inputs(batch)
                if not len(batch["lengths"]):  # a rank without rows takes part in the forward
                    batch = nothing_to_learn(batch)
                for part in self._eval_parts(batch):
                    total += self.sum_of_losses(model, part).item()
                count += len(targets(batch)[0])
        loss = self._sum_over_ranks(total) / self._sum_over_ranks(count)
        metrics = {f"{metric_key_prefix}_loss": float(loss)}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _eval_parts(self, batch: Batch) -> Iterable[Batch]:
        return split(batch, 1) if self.packing.one_by_one else (batch,)
