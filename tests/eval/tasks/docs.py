# SPDX-License-Identifier: Apache-2.0
"""One question of each benchmark, with the fields of its public release."""

_OPTIONS = ("a book", "a cat", "a dog", "a car", "a hat")
_LETTERED = [f"{letter}. {option}" for letter, option in zip("ABCDE", _OPTIONS)]
_TEMPCOMPASS = {"video_id": "12", "dim": "action"}

DOCS = {
  "videomme": {
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "task_type": "Counting Problem",
    "question": "What is seen?",
    "options": _LETTERED[:4],
    "answer": "B",
  },
  "mlvu": {
    "video_name": "order_1.mp4",
    "question": "What comes first\n(A) a book\n(B) a cat\n(C) a dog\n(D) a car\n",
    "answer": "B",
    "task_type": "order",
  },
  "mvbench": {
    "sub_task": "action_sequence",
    "video": "ABC.mp4",
    "question": "What is seen?",
    "candidates": list(_OPTIONS[:4]),
    "answer": "a cat",
    "start": 1.0,
    "end": 2.0,
  },
  "egoschema_subset": {
    "video_idx": "001934bb",
    "question": "What is c doing?",
    "option": _LETTERED,
    "answer": "1",
  },
  "longvideobench": {
    "video_id": "86CxyhFV9MI",
    "video_path": "86CxyhFV9MI.mp4",
    "question": "What is seen?",
    **{f"option{i}": option for i, option in enumerate((*_OPTIONS[:4], "N/A"))},
    "correct_choice": 1,
    "duration": 10.0,
    "duration_group": 15,
    "question_category": "S2E",
    "subtitle_path": "86CxyhFV9MI_en.json",
  },
  "perceptiontest": {
    "video_name": "video_10",
    "question": "What is seen?",
    "question_id": 0,
    "options": list(_OPTIONS[:3]),
    "answer_id": 1,
    "area": "semantics",
    "reasoning": "descriptive",
    "tag": ["object recognition"],
  },
  "nextqa_mc": {
    "video": 4010069381,
    "question": "why did he laugh",
    **{f"a{i}": option for i, option in enumerate(_OPTIONS)},
    "answer": 1,
  },
  "activitynetqa": {
    "video_name": "1QIUV7WYKXg",
    "question": "does the MAN run",
    "question_id": "v_1QIUV7WYKXg_3",
    "answer": "yes",
    "type": "3",
  },
  "tempcompass_multi_choice": {
    **_TEMPCOMPASS,
    "question": "What is it doing?\nA. running\nB. eating\nC. sleeping",
    "answer": "B. eating",
  },
  "tempcompass_yes_no": {**_TEMPCOMPASS, "question": "Is it eating?", "answer": "yes"},
  "tempcompass_caption_matching": {
    **_TEMPCOMPASS,
    "question": "Which caption fits?\nCaption A: It runs.\nCaption B: It eats.",
    "answer": "Caption B: It eats.",
  },
  "tempcompass_captioning": {
    **_TEMPCOMPASS,
    "question": "Describe the video.",
    "mc_question": "What is it doing?\nA. running\nB. eating\nC. sleeping",
    "mc_answer": "B. eating",
  },
}
DOCS["videomme_w_subtitle"] = DOCS["videomme"]
DOCS["egoschema"] = {**DOCS["egoschema_subset"], "answer": None}
