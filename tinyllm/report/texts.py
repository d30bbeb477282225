"""The words of the report, in Chinese and English."""

from __future__ import annotations

LEVELS = {
    "zh": {"learned": "学会了", "barely": "几乎没学到", "overfitted": "过拟合",
           "not_at_all": "完全没学到", "unknown": "无法判断"},
    "en": {"learned": "learned", "barely": "barely learned", "overfitted": "overfitted",
           "not_at_all": "learned nothing at all", "unknown": "cannot be judged"},
}  # fmt: skip

REASONS = {
    "zh": {
        "drop": "留出集损失下降 {mean:.3f} nat/词元（{relative:.1%}），95% 置信区间 {low:.3f} 到 {high:.3f}",
        "small_drop": "留出集损失只下降 {relative:.1%}（95% 置信区间 {low:.3f} 到 {high:.3f} nat/词元）",
        "no_drop": "留出集损失没有可靠地下降：变化 {mean:.3f} nat/词元，95% 置信区间 {low:.3f} 到 {high:.3f}",
        "worse": "留出集损失上升了 {relative:.1%}：模型比训练前更差；学习率太高，或训练数据与留出集无关",
        "memorised": "只记住了训练数据：训练行损失下降 {train:.1%}，留出集损失却没有下降（变化 {mean:.3f} nat/词元）",
        "past_best": "留出集损失先降到 {best:.3f}，最后回升到 {last:.3f}，而训练行的损失只有 {train:.3f}；减少轮数，或用 --load_best_model_at_end True",
        "learning_rate_zero": "学习率是 0，权重没有任何变化",
        "no_steps": "一步也没有训练",
        "no_effect": "适配器没有任何作用：有它和没有它，每一行的损失都相同",
        "answers_masked": "掩码反了：{with_markers:.0%} 的训练行在学提示里的角色标记，没有一行学习结束符，所以答案没有参与学习",
        "no_held_out": "没有留出集，学没学会无从比较；请用 --eval_dataset 给出留出集",
        "question_ignored": "回答与问题无关：换成别人的问题，标准答案的损失没有可靠地变大（{mean:.3f} nat/词元，95% 置信区间 {low:.3f} 到 {high:.3f}）；请检查问题和答案是否配对",
        "never_stops": "没有学会停下：标准答案之后结束符的概率为 {on:.1%}（训练前 {off:.1%}）；有结束符可学的训练行占 {with_stop:.0%}",
        "few_steps": "只训练了 {steps} 步，太少了",
        "few_rows": "留出集只有 {rows} 行，置信区间说明不了多少",
        "also_trained": "留出集里有 {rows} 行的问题也在训练集里，结果偏好",
        "rows_without_stop": "只有 {with_stop:.0%} 的训练行教结束符",
        "markers_learned": "{with_markers:.0%} 的训练行把角色标记也当成答案来学，请检查掩码",
        "forgot": "通用文本的损失上升 {rise:.1%}，原有能力有所遗忘",
        "stops": "标准答案之后结束符的概率为 {on:.0%}",
    },
    "en": {
        "drop": "the held-out loss fell by {mean:.3f} nats a token ({relative:.1%}), 95 % interval {low:.3f} to {high:.3f}",
        "small_drop": "the held-out loss fell by {relative:.1%} only (95 % interval {low:.3f} to {high:.3f} nats a token)",
        "no_drop": "the held-out loss did not fall reliably: by {mean:.3f} nats a token, 95 % interval {low:.3f} to {high:.3f}",
        "worse": "the held-out loss changed by {relative:.1%}: worse than before the training; the learning rate is too high, or the training rows have nothing to do with the held-out ones",
        "memorised": "the training rows were memorised: their loss fell by {train:.1%}, the held-out loss did not fall ({mean:.3f} nats a token)",
        "past_best": "the held-out loss fell to {best:.3f} and ended at {last:.3f}, while the training rows' loss is {train:.3f}; train fewer epochs, or use --load_best_model_at_end True",
        "learning_rate_zero": "the learning rate is 0, so no weight changed",
        "no_steps": "not a single step was trained",
        "no_effect": "the adapter has no effect: every row's loss is the same with and without it",
        "answers_masked": "the mask is the wrong way round: {with_markers:.0%} of the training rows teach role markers of the prompt and none teaches the end token, so the answers were not learned",
        "no_held_out": "there are no held-out rows, so nothing can be compared; give some with --eval_dataset",
        "question_ignored": "the answers do not depend on the questions: behind another row's question the right answers' loss is not reliably higher ({mean:.3f} nats a token, 95 % interval {low:.3f} to {high:.3f}); are questions and answers paired rightly?",
        "never_stops": "it has not learned to stop: after a right answer the end token has a probability of {on:.1%} (before the training {off:.1%}); {with_stop:.0%} of the training rows teach it",
        "few_steps": "only {steps} steps were trained, which is very few",
        "few_rows": "only {rows} rows are held out, so the interval means little",
        "also_trained": "{rows} held-out questions are trained on as well, which flatters the result",
        "rows_without_stop": "only {with_stop:.0%} of the training rows teach the end token",
        "markers_learned": "{with_markers:.0%} of the training rows teach role markers as if they were answers; check the mask",
        "forgot": "the loss on general text rose by {rise:.1%}: something was forgotten",
        "stops": "after a right answer the end token has a probability of {on:.0%}",
    },
}  # fmt: skip

PAGE = {
    "zh": {
        "title": "训练报告", "compare": "训练对比", "held_out": "留出集", "off": "训练前", "on": "训练后",
        "loss": "损失（nat/词元）", "perplexity": "困惑度", "token_accuracy": "词元准确率",
        "stop_probability": "标准答案后结束符的概率", "stop_share": "自己停下的回答",
        "drop": "损失下降", "interval": "95% 置信区间", "what": "项目", "value": "值",
        "rows_measured": "量了 {rows} 行（共 {total} 行），{tokens} 个答案词元",
        "general": "遗忘：通用文本的损失", "train": "训练行的损失（取样）",
        "question": "自己的问题比别人的问题让答案更可能（nat/词元）",
        "evidence": "证据", "replies": "回答对照", "gold": "标准答案", "unfinished": "（未停下）",
        "own": "你的问题", "from_data": "留出集的问题", "from_train": "训练行的问题（没有留出集）",
        "curves": "曲线", "step": "步", "curve_loss": "训练损失",
        "curve_eval_loss": "留出集损失", "curve_learning_rate": "学习率", "data": "数据账目",
        "settings": "设置", "training": "训练", "versions": "版本", "lineage": "中断与续训",
        "no_lineage": "一次训练完成，没有中断", "started": "开始", "after_step": "从哪一步之后", "certificate": "合并证书",
        "file": "文件", "part": "用途", "num_read": "读入", "num_kept": "保留", "num_refused": "拒绝",
        "num_dropped": "丢弃", "num_shortened": "截短", "num_duplicates": "重复", "num_held_out": "留出",
        "num_steps": "步数", "epochs": "轮数", "learning_rate": "学习率", "train_loss": "训练损失（平均）",
        "eval_loss": "留出集损失（全部行）", "best_eval_loss": "最好的留出集损失", "seconds": "训练时间（秒）",
        "eval_loss_before": "训练前的留出集损失（全部行）",
        "tokens_per_second": "词元/秒", "examples_per_second": "样本/秒", "peak_memory_bytes": "峰值内存",
        "parameters": "训练的参数", "device": "设备", "run": "训练", "verdict": "结论", "report_seconds": "做这份报告用了（秒）",
        "planned_seconds": "计划的时间（秒）", "planned_memory": "计划的内存", "expand": "展开",
        "train_part": "训练", "held_out_part": "留出",
        "note": "两边用同样的基础权重、同样的行和同样的问题；回答都取最可能的词元。",
    },
    "en": {
        "title": "Training report", "compare": "Runs compared", "held_out": "held-out rows",
        "off": "before", "on": "after",
        "loss": "loss (nats a token)", "perplexity": "perplexity", "token_accuracy": "token accuracy",
        "stop_probability": "end token's probability after a right answer",
        "stop_share": "replies that stop by themselves", "drop": "drop of the loss",
        "interval": "95 % interval", "what": "what", "value": "value",
        "rows_measured": "{rows} rows measured (of {total}), {tokens} answer tokens",
        "general": "forgetting: loss on general text", "train": "loss on training rows (sample)",
        "question": "how much likelier an answer is behind its own question (nats a token)",
        "evidence": "Evidence", "replies": "Replies side by side", "gold": "answer in the data",
        "unfinished": "(did not stop)", "own": "your question", "from_data": "held-out question",
        "from_train": "training question (nothing is held out)",
        "curves": "Curves", "step": "step", "curve_loss": "training loss",
        "curve_eval_loss": "held-out loss", "curve_learning_rate": "learning rate",
        "data": "Data ledger", "settings": "Settings", "training": "Training",
        "versions": "Versions", "lineage": "Interruptions and resumes",
        "no_lineage": "trained in one go, never interrupted",
        "started": "started", "after_step": "after step", "certificate": "Merge certificate",
        "file": "file", "part": "part", "num_read": "read", "num_kept": "kept", "num_refused": "refused",
        "num_dropped": "dropped", "num_shortened": "shortened", "num_duplicates": "repeated",
        "num_held_out": "held out",
        "num_steps": "steps", "epochs": "epochs", "learning_rate": "learning rate",
        "train_loss": "training loss (mean)", "eval_loss": "held-out loss (all rows)",
        "eval_loss_before": "held-out loss before (all rows)",
        "best_eval_loss": "best held-out loss", "seconds": "training time (seconds)",
        "tokens_per_second": "tokens a second", "examples_per_second": "examples a second",
        "peak_memory_bytes": "peak memory", "parameters": "trained parameters", "device": "device",
        "run": "run", "verdict": "verdict", "report_seconds": "this report took (seconds)",
        "planned_seconds": "planned time (seconds)", "planned_memory": "planned memory",
        "expand": "show", "train_part": "train", "held_out_part": "held-out",
        "note": "Both sides see the same base weights, the same rows and the same questions; replies take the likeliest tokens.",
    },
}  # fmt: skip


def verdict_line(verdict: dict, lang: str) -> str:
    """The verdict with its reasons, on one line."""
    reasons = [reason_text(reason, lang) for reason in verdict["reasons"]]
    if lang == "zh":
        return f"{LEVELS[lang][verdict['level']]}：{'；'.join(reasons)}"
    return f"{LEVELS[lang][verdict['level']]}: {'; '.join(reasons)}"


def reason_text(reason: dict, lang: str) -> str:
    """One reason with its numbers."""
    return REASONS[lang][reason["name"]].format(**reason["values"])
