"""Rows: each layout with the example it becomes, what is beside it, what each bad row is told."""

import re

import pytest

from rlhf_jax.data.examples import Example, Turn
from rlhf_jax.data.rows import LEARNT, UNREAD, UNREAD_IN_MESSAGE, to_example
from rlhf_jax.errors import DataError

HI, YO, WHY = Turn('user', 'Hi?'), Turn('assistant', 'Yo.'), Turn('user', 'Why?')
BRIEF, ADD = Turn('system', 'Be brief.'), Turn('user', 'Add.\n\n1, 2')
HISTORY = '\n\nHuman: Hi?\n\nAssistant: Yo.\n\nHuman: Why?\n\nAssistant:'
GOOD, OTHER = {'role': 'assistant', 'content': 'Good.'}, {'role': 'assistant', 'content': 'Bad.'}
USER, SYSTEM = {'role': 'user', 'content': 'Hi?'}, {'role': 'system', 'content': 'Be brief.'}


def part_of(text):
  return {'type': 'text', 'text': text}


def pair(*turns):
  return Example(turns, ('Good.', 'Bad.'), (0, 1))


def demonstration(*turns):
  return Example(turns, ('Good.',), (0,))


# ---- layouts

LAYOUTS = {
  'prompt, response': ({'prompt': 'Hi?', 'response': 'Good.', 'id': 7}, demonstration(HI)),
  'completion': ({'prompt': 'Hi?', 'completion': 'Good.'}, demonstration(HI)),
  'output': ({'prompt': 'Hi?', 'output': 'Good.'}, demonstration(HI)),
  'question, answer': ({'question': 'Hi?', 'answer': 'Good.'}, demonstration(HI)),
  'tldr': ({'prompt': 'POST: long.\nTL;DR:', 'label': ' Short.'},
           Example((Turn('user', 'POST: long.\nTL;DR:'),), (' Short.',), (0,))),
  'tldr pair': ({'prompt': 'POST: long.\nTL;DR:', 'chosen': ' Short.', 'rejected': ' It is'},
                Example((Turn('user', 'POST: long.\nTL;DR:'),), (' Short.', ' It is'), (0, 1))),
  'nulls': ({'prompt': 'Hi?', 'response': 'Good.', 'chosen': None, 'rejected': None},
            demonstration(HI)),
  'messages for a prompt': ({'prompt': [USER], 'completion': [GOOD]}, demonstration(HI)),
  'transcript for a prompt': ({'prompt': HISTORY, 'response': 'Good.'}, demonstration(HI, YO, WHY)),
  'transcript for a prompt, not opened': ({'prompt': '\n\nHuman: Hi?', 'response': 'Good.'},
                                          demonstration(HI)),
  'transcript for a prompt, stripped': ({'prompt': 'Human: Hi?\n\nAssistant:', 'response': 'Good.'},
                                        demonstration(HI)),
  'alpaca': ({'instruction': 'Add.', 'input': '1, 2', 'output': 'Good.'}, demonstration(ADD)),
  'alpaca, empty input': ({'instruction': 'Hi?', 'input': '', 'output': 'Good.'},
                          demonstration(HI)),
  'alpaca, no input': ({'instruction': 'Hi?', 'output': 'Good.', 'text': 'not read'},
                       demonstration(HI)),
  'dolly': ({'instruction': 'Add.', 'context': '1, 2', 'response': 'Good.'}, demonstration(ADD)),
  'messages': ({'messages': [{'role': 'system', 'content': 'Be brief.'}, USER, GOOD]},
               demonstration(BRIEF, HI)),
  'messages, empty system': ({'messages': [{'role': 'system', 'content': ' '}, USER, GOOD]},
                             demonstration(HI)),
  'messages to answer': ({'messages': [USER]}, Example((HI,))),
  'messages as a dict of lists': (
    {'messages': {'role': ['user', 'assistant'], 'content': ['Hi?', 'Good.']}},
    demonstration(HI)),
  'conversations': (
    {'conversations': [{'from': 'system', 'value': 'Be brief.'}, {'from': 'human', 'value': 'Hi?'},
                       {'from': 'gpt', 'value': 'Good.'}]}, demonstration(BRIEF, HI)),
  'hh': ({'chosen': HISTORY + ' Good.', 'rejected': HISTORY + ' Bad.\n'}, pair(HI, YO, WHY)),
  'hh, stripped': (
    {'chosen': 'Human: Hi?\n\nAssistant: Good.', 'rejected': 'Human: Hi?\n\nAssistant: Bad.'},
    pair(HI)),
  'hh, Windows newlines': (
    {'chosen': (HISTORY + ' Good.').replace('\n', '\r\n'), 'rejected': HISTORY + ' Bad.'},
    pair(HI, YO, WHY)),
  'prompt, chosen, rejected': ({'prompt': 'Hi?', 'chosen': 'Good.', 'rejected': 'Bad.'}, pair(HI)),
  'transcript, chosen, rejected': ({'prompt': HISTORY, 'chosen': 'Good.', 'rejected': 'Bad.'},
                                   pair(HI, YO, WHY)),
  'hh and its prompt': (
    {'prompt': HISTORY, 'chosen': HISTORY + ' Good.', 'rejected': HISTORY + ' Bad.'},
    pair(HI, YO, WHY)),
  'pair of messages': (
    {'chosen': [USER, GOOD], 'rejected': [USER, OTHER], 'messages': [USER, GOOD]},
    pair(HI)),
  'pair of messages and its prompt': (
    {'prompt': 'Hi?', 'chosen': [USER, GOOD], 'rejected': [USER, OTHER]},
    pair(HI)),
  'pair of last messages': ({'prompt': [USER], 'chosen': [GOOD], 'rejected': [OTHER]}, pair(HI)),
  'pair with a system turn': (
    {'prompt': 'Hi?', **{name: [{'role': 'system', 'content': 'Be brief.'}, USER, last]
                         for name, last in (('chosen', GOOD), ('rejected', OTHER))}},
    pair(BRIEF, HI)),
  'ranks': ({'prompt': 'Hi?', 'responses': ['a', 'b', 'c', 'd'], 'ranks': [3, 1, 7, 3]},
            Example((HI,), ('a', 'b', 'c', 'd'), (1, 0, 2, 1))),
  'scores': ({'prompt': 'Hi?', 'responses': ['a', 'b', 'c', 'd'], 'scores': [0.5, 2, -1.5, 0.5]},
             Example((HI,), ('a', 'b', 'c', 'd'), (1, 0, 2, 1))),
  'ranks before scores': (
    {'prompt': 'Hi?', 'responses': ['a', 'b'], 'ranks': [1, 0], 'scores': [5, 1]},
    Example((HI,), ('a', 'b'), (1, 0))),
  'one response of a list': ({'prompt': 'Hi?', 'responses': ['Good.']}, demonstration(HI)),
  'prompt': ({'prompt': 'Hi?'}, Example((HI,))),
  'prompt as messages': ({'prompt': [{'role': 'system', 'content': 'Be brief.'}, USER]},
                         Example((BRIEF, HI))),
  'chat that the assistant begins': (
    {'messages': [{'role': 'assistant', 'content': 'Yo.'}, USER, GOOD]}, demonstration(YO, HI)),
  'content of parts': (
    {'messages': [
      {'role': 'user', 'content': [part_of('H'), part_of('i?') | {'url': None}]}, GOOD]},
    demonstration(HI)),
  'content of parts as a dict of lists': (
    {'messages': [
      {'role': 'user', 'content': {'type': ['text', 'text'], 'text': ['H', 'i?']}}, GOOD]},
    demonstration(HI)),
  'code keeps its spaces': ({'prompt': 'Hi?', 'completion': '    if x:\n'},
                            Example((HI,), ('    if x:\n',), (0,))),
  'code keeps its spaces in a chat': (
    {'messages': [USER, {'role': 'assistant', 'content': '    if x:'}]},
    Example((HI,), ('    if x:',), (0,))),
  'text': ({'text': HISTORY + ' Good.'}, demonstration(HI, YO, WHY)),
  'text to answer': ({'text': HISTORY}, Example((HI, YO, WHY))),
  'text that the user ends': ({'text': HISTORY.removesuffix('\n\nAssistant:')},
                              Example((HI, YO, WHY))),
  'unicode': ({'prompt': 'Größe? 木 🌳', 'response': 'naïve\u2028line'},
              Example((Turn('user', 'Größe? 木 🌳'),), ('naïve\u2028line',), (0,))),
}


@pytest.mark.parametrize('row, example', LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(row, example):
  assert to_example(row) == example


def test_place_is_kept():
  assert to_example({'prompt': 'Hi?'}, 'train.jsonl row 3').place == 'train.jsonl row 3'


# ---- bad rows

CHAT = {'role': 'user', 'content': 'Hi?'}
RANKED = {'prompt': 'Hi?', 'responses': ['a', 'b']}
BAD = {
  'not an object': ([1, 2], 'the row is [1, 2]; needed is an object with named fields'),
  'fields of no layout': ({'id': 7, 'body': 'x'},
                          'the fields are id, body; needed is one of: [prompt +] chosen'),
  'no fields': ({}, 'the fields are none; needed'),
  'chosen alone': ({'prompt': 'Hi?', 'chosen': 'a'},
                   'where chosen is null or lacks its counterpart'),
  'null response': ({'prompt': 'Hi?', 'response': None},
                    'where response is null or lacks its counterpart'),
  'ranks without responses': ({'prompt': 'Hi?', 'ranks': [0]}, 'where ranks is null or lacks'),
  'two responses': ({'prompt': 'Hi?', 'completion': 'a', 'label': 'b'},
                    'completion, label could each be'),
  'type of prompt': ({'prompt': 3, 'response': 'a'},
                     "'prompt' is 3; needed is a string or a list of messages"),
  'type of response': ({'prompt': 'Hi?', 'response': 3},
                       "'response' is 3; needed is a string or a list of messages"),
  'type of instruction': ({'instruction': ['x'], 'output': 'a'},
                          "'instruction' is list ['x']; needed is a string"),
  'type of input': ({'instruction': 'x', 'input': 3, 'output': 'a'},
                    "'input' is int 3; needed is a string"),
  'type of text': ({'text': 3}, "'text' is int 3; needed is a string"),
  'empty prompt': ({'prompt': ' \n', 'response': 'a'}, "'prompt' is empty; needed is some text"),
  'empty prompt list': ({'prompt': [], 'response': 'a'}, 'the prompt ends with nothing'),
  'empty response': ({'prompt': 'Hi?', 'response': ''}, "'response' is empty; needed is some text"),
  'empty instruction': ({'instruction': '', 'output': 'a'}, "'instruction' is empty"),
  'empty turn': ({'messages': [CHAT, {'role': 'assistant', 'content': ''}]},
                 "'messages[1]' is empty"),
  'half a character': ({'prompt': 'Hi \ud83d', 'response': 'a'},
                       "'prompt' has half a surrogate pair, '\\ud83d'"),
  'equal pair': ({'prompt': 'Hi?', 'chosen': 'a', 'rejected': 'a'},
                 "'chosen' equals 'rejected', so the pair"),
  'equal transcripts': ({'chosen': HISTORY + ' a', 'rejected': HISTORY + ' a '},
                        "'chosen' equals 'rejected'"),
  'other histories': ({'chosen': HISTORY + ' a', 'rejected': '\n\nHuman: Hi?\n\nAssistant: b'},
                      "'chosen' and 'rejected' differ before their last turn"),
  'other prompt': ({'prompt': 'Who?', 'chosen': [CHAT, GOOD], 'rejected': [CHAT, OTHER]},
                   "'prompt' is 'Who?', but the responses start with 'Hi?'"),
  'no prompt': ({'responses': ['a', 'b'], 'ranks': [0, 1]},
                "the fields are responses, ranks, without 'prompt'"),
  'no prompt in messages': ({'chosen': [GOOD], 'rejected': [OTHER]},
                            "fields are chosen, rejected, without 'prompt'"),
  'pair that is no transcript': ({'chosen': 'a', 'rejected': 'b'},
                                 "'chosen' is a transcript that starts with 'a'"),
  'transcript from the assistant': (
    {'chosen': '\n\nAssistant: a', 'rejected': '\n\nAssistant: b'},
    "starts with '\\n\\nAssistant: a'; needed is '\\n\\nHuman:' there"),
  'transcript without assistant': (
    {'chosen': '\n\nHuman: Hi?', 'rejected': '\n\nHuman: Hi?'},
    "'chosen' ends with a turn of the user, 'Hi?'; needed is the assistant's turn"),
  'transcript without response': ({'chosen': HISTORY + ' a', 'rejected': HISTORY},
                                  "'rejected' is empty"),
  'transcript with an empty turn': ({'chosen': '\n\nHuman:\n\nAssistant: a', 'rejected': 'b'},
                                    "'chosen[0]' is empty"),
  'two assistant turns': ({'text': HISTORY + ' a\n\nAssistant: b'},
                          "prompt ends with a turn of the assistant, 'a'"),
  'preamble': ({'prompt': 'A talk.\n\nHuman: Hi?\n\nAssistant:', 'response': 'a'},
               "starts with 'A talk."),
  'text without assistant': ({'text': '\n\nHuman: Hi?'}, "'text' has no Assistant turn"),
  'text that is no transcript': ({'text': 'Once upon a time'},
                                 "'text' is a transcript that starts with 'Once upon"),
  'prompt that is answered': ({'prompt': [CHAT, GOOD], 'response': 'a'},
                              'prompt ends with a turn of the assistant'),
  'messages without user': ({'messages': [GOOD]},
                            'prompt ends with nothing; needed is one that ends with'),
  'messages of a string': ({'messages': 'Hi?'},
                           "'messages' is 'Hi?'; needed is a string or a list of messages"),
  'message of a string': ({'messages': ['Hi?']},
                          "'messages[0]' is 'Hi?'; needed is {role, content} or {from, value}"),
  'message without content': ({'messages': [{'role': 'user'}]},
                              "'messages[0]' is {'role': 'user'}; needed is {role"),
  'role': ({'messages': [CHAT, {'role': 'tool', 'content': 'x'}]},
           "'messages[1]' has role 'tool'; needed is"),
  'role of another type': ({'messages': [{'role': ['user'], 'content': 'x'}]},
                           "has role ['user']; needed"),
  'content': ({'messages': [{'role': 'user', 'content': None}]},
              "'messages[0]' is NoneType None; needed is a string"),
  'lists of other lengths': ({'messages': {'role': ['user'], 'content': []}},
                             'is a dict of lists of unequal length'),
  'completion from the user': ({'prompt': 'Hi?', 'completion': [CHAT]},
                               "'completion' ends with a turn of the user"),
  'responses of a string': ({'prompt': 'Hi?', 'responses': 'a'},
                            "'responses' is 'a'; needed is a list of one or more"),
  'no responses': ({'prompt': 'Hi?', 'responses': []},
                   "'responses' is []; needed is a list of one or more"),
  'one empty response': ({'prompt': 'Hi?', 'responses': ['a', ''], 'ranks': [0, 1]},
                         "'responses[1]' is empty"),
  'no ranks': (RANKED, "there are 2 'responses', but neither 'ranks' nor 'scores'"),
  'length of ranks': (RANKED | {'ranks': [0, 1, 2]},
                      "'ranks' has 3 entries for 2 responses; needed is one for each"),
  'type of ranks': (RANKED | {'ranks': [0.5, 1]},
                    "'ranks' is [0.5, 1]; needed is a list of whole numbers"),
  'bool for a rank': (RANKED | {'ranks': [True, False]},
                      "'ranks' is [True, False]; needed is a list of whole numbers"),
  'ranks of a string': (RANKED | {'ranks': '01'},
                        "'ranks' is '01'; needed is a list of whole numbers"),
  'scores that are not finite': (RANKED | {'scores': [float('nan'), 1]},
                                 "'scores' is [nan, 1]; needed is a"),
  'equal ranks': (RANKED | {'ranks': [1, 1]}, 'all 2 ranks are equal, so they say nothing'),
  'equal scores': (RANKED | {'scores': [0.5, 0.5]}, 'all 2 ranks are equal, so they say nothing'),
  'equal responses': (RANKED | {'responses': ['a', 'a'], 'ranks': [0, 1]},
                      'all 2 responses are equal'),
}


@pytest.mark.parametrize('row, message', BAD.values(), ids=BAD)
def test_bad_rows(row, message):
  advice = 'Mend or drop the row, or pass --data.skip-bad-rows.'
  with pytest.raises(DataError,
                     match=rf'^t\.jsonl row 7: .*{re.escape(message)}.*{re.escape(advice)}$'):
    to_example(row, 't.jsonl row 7')


def test_long_values_are_cut():
  with pytest.raises(DataError) as error:
    to_example({'messages': 'x' * 9999})
  assert len(str(error.value)) < 300


# ---- fields beside a layout that change what it means

SHAREGPT = [{'from': 'human', 'value': 'Hi?'}, {'from': 'gpt', 'value': 'Good.'}]
PAIRS = [['Hi?', 'Yo.']]
BESIDE = {
  'orca': ({'system_prompt': 'Be brief.', 'question': 'Hi?', 'response': 'Good.', 'id': 'flan.1'},
           demonstration(BRIEF, HI)),
  'orca pairs': ({'system': 'Be brief.', 'question': 'Hi?', 'chosen': 'Good.', 'rejected': 'Bad.'},
                 pair(BRIEF, HI)),
  'orca pairs, no system': (
    {'system': '', 'question': 'Hi?', 'chosen': 'Good.', 'rejected': 'Bad.'}, pair(HI)),
  'alpaca of LLaMA-Factory': (
    {'instruction': 'Why?', 'input': '', 'output': 'Good.', 'system': 'Be brief.',
     'history': PAIRS}, demonstration(BRIEF, HI, YO, WHY)),
  'alpaca pairs of LLaMA-Factory': (
    {'instruction': 'Add.', 'input': '1, 2', 'chosen': 'Good.', 'rejected': 'Bad.',
     'history': PAIRS}, pair(HI, YO, ADD)),
  'kto of LLaMA-Factory': (
    {'instruction': 'Hi?', 'input': '', 'output': 'Good.', 'kto_tag': True}, demonstration(HI)),
  'system of a prompt': ({'prompt': 'Hi?', 'system_message': 'Be brief.'}, Example((BRIEF, HI))),
  'system of ranked responses': ({'prompt': 'Hi?', 'responses': ['Good.', 'Bad.'], 'ranks': [0, 1],
                                  'system': 'Be brief.'}, pair(BRIEF, HI)),
  'system of ShareGPT': ({'conversations': SHAREGPT, 'system': 'Be brief.'},
                         demonstration(BRIEF, HI)),
  'system of a transcript': ({'text': HISTORY + ' Good.', 'system': 'Be brief.'},
                             demonstration(BRIEF, HI, YO, WHY)),
  'system of OpenHermes, null': (
    {'conversations': [message | {'weight': None} for message in SHAREGPT], 'system_prompt': None,
     'category': 'x'}, demonstration(HI)),
  'system twice, equal': (
    {'messages': [SYSTEM, USER, GOOD], 'system': 'Be brief. ', 'system_prompt': 'Be brief.'},
    demonstration(BRIEF, HI)),
  'system twice in a pair, equal': (
    {'system': 'Be brief.', 'prompt': 'Hi?', 'chosen': [SYSTEM, USER, GOOD],
     'rejected': [SYSTEM, USER, OTHER]},
    pair(BRIEF, HI)),
  'system of messages for a prompt': (
    {'prompt': [USER], 'completion': [GOOD], 'system': 'Be brief.'}, demonstration(BRIEF, HI)),
  'history of messages': ({'prompt': 'Why?', 'response': 'Good.',
                           'history': [USER, {'role': 'assistant', 'content': 'Yo.'}]},
                          demonstration(HI, YO, WHY)),
  'history, empty': ({'instruction': 'Hi?', 'output': 'Good.', 'history': []}, demonstration(HI)),
  'history of a prompt': ({'prompt': 'Why?', 'history': PAIRS}, Example((HI, YO, WHY))),
  'history that a transcript has': ({'prompt': HISTORY, 'response': 'Good.', 'history': PAIRS},
                                    demonstration(HI, YO, WHY)),
  'input under a prompt': ({'prompt': 'Add.', 'input': '1, 2', 'completion': 'Good.'},
                           demonstration(ADD)),
  'context under a question': ({'question': 'Add.', 'context': '1, 2', 'answer': 'Good.'},
                               demonstration(ADD)),
  'context under the prompt of a pair': (
    {'question': 'Add.', 'context': '1, 2', 'chosen': 'Good.', 'rejected': 'Bad.'}, pair(ADD)),
  'input and context': (
    {'instruction': 'Add.', 'input': '1, 2', 'context': 'Now.', 'output': 'Good.'},
    demonstration(Turn('user', 'Add.\n\n1, 2\n\nNow.'))),
  'context that a chat has': (
    {'messages': [{'role': 'user', 'content': 'Add.\n\n1, 2'}, GOOD], 'context': ' 1, 2\n'},
    demonstration(ADD)),
  'kto': ({'prompt': 'Hi?', 'completion': 'Good.', 'label': True}, demonstration(HI)),
  'kto of messages': ({'prompt': [USER], 'completion': [GOOD], 'label': True}, demonstration(HI)),
  'kto of a chat': ({'messages': [USER, GOOD], 'label': True}, demonstration(HI)),
  'kto in numbers': ({'prompt': 'Hi?', 'completion': 'Good.', 'label': 1}, demonstration(HI)),
  'OpenAI fine-tuning': (
    {'messages': [USER, GOOD | {'weight': 1}], 'tools': [], 'parallel_tool_calls': False},
    demonstration(HI)),
  'weight of what the user says': (
    {'messages': [USER | {'weight': 0}, GOOD | {'train': True}]}, demonstration(HI)),
  'UltraFeedback': ({'prompt': 'Hi?', 'prompt_id': 'x', 'chosen': [USER, GOOD],
                     'rejected': [USER, OTHER], 'messages': [USER, GOOD], 'score_chosen': 8.0,
                     'score_rejected': 3.0}, pair(HI)),
  'Tulu preferences': (
    {'id': 'x', 'chosen': [USER, GOOD], 'rejected': [USER, OTHER], 'source': 'y'}, pair(HI)),
  'HelpSteer': ({'prompt': 'Hi?', 'response': 'Good.', 'helpfulness': 4, 'verbosity': 2},
                demonstration(HI)),
  'UltraChat': ({'prompt': 'Hi?', 'prompt_id': 'x', 'messages': [USER, GOOD]}, demonstration(HI)),
}


@pytest.mark.parametrize('row, example', BESIDE.values(), ids=BESIDE)
def test_what_stands_beside_a_layout_is_read(row, example):
  assert to_example(row) == example


ADVICE = 'Mend or drop the row, or pass --data.skip-bad-rows.'
REFUSED = {
  'other system': ({'messages': [SYSTEM, USER, GOOD], 'system': 'Ramble.'},
                   "'system' is 'Ramble.', but the system turn is 'Be brief.'; needed is one of "
                   'them'),
  'other system in ShareGPT': (
    {'conversations': [{'from': 'system', 'value': 'Be brief.'}, *SHAREGPT],
     'system_prompt': 'Ramble.'}, "'system_prompt' is 'Ramble.', but the system turn is"),
  'two systems': ({'prompt': 'Hi?', 'system': 'Be brief.', 'system_prompt': 'Ramble.'},
                  "'system_prompt' is 'Ramble.', but the system turn is 'Be brief.'"),
  'type of system': ({'prompt': 'Hi?', 'system': ['Be brief.']},
                     "'system' is list ['Be brief.']; needed is a string"),
  'undesired': ({'prompt': 'Hi?', 'completion': 'Bad.', 'label': False},
                "'label' is False: the response is an undesired one, and no demonstration; needed "
                'is a desired one'),
  'undesired chat': ({'messages': [USER, OTHER], 'label': False},
                     "'label' is False: the response is an undesired"),
  'undesired, in numbers': ({'messages': [USER, OTHER], 'label': 0},
                            "'label' is 0: the response is an undesired"),
  'undesired alpaca': ({'instruction': 'Hi?', 'output': 'Bad.', 'kto_tag': False},
                       "'kto_tag' is False: the response"),
  'label of another kind': ({'messages': [USER, OTHER], 'label': 3},
                            "'label' is 3; needed is true or false"),
  'label without a response': ({'prompt': 'Hi?', 'label': True},
                               'where label is null or lacks its counterpart'),
  'history before a chat': (
    {'messages': [{'role': 'user', 'content': 'Why?'}, GOOD], 'history': PAIRS},
    "'history' is [['Hi?', 'Yo.']], but the prompt starts with a turn of the user, 'Why?'"),
  'history before a transcript': (
    {'prompt': '\n\nHuman: Why?', 'response': 'Good.', 'history': PAIRS},
    "but the prompt starts with a turn of the user, 'Why?'"),
  'history of one side': ({'prompt': 'Why?', 'history': ['Hi?', 'Yo.']},
                          "'history' is ['Hi?', 'Yo.']; needed is a list of pairs [user, "
                          'assistant]'),
  'history of text': ({'prompt': 'Why?', 'history': 'Hi? Yo.'},
                      "'history' is 'Hi? Yo.'; needed is a list of pairs"),
  'half a pair of history': ({'prompt': 'Why?', 'history': [['Hi?', '']]}, "'history[0]' is empty"),
  'context that a chat lacks': (
    {'messages': [USER, GOOD], 'context': 'In Rome.'},
    "'context' is 'In Rome.', which the prompt does not say; needed is a prompt that has it"),
  'input that a transcript lacks': (
    {'chosen': HISTORY + ' a', 'rejected': HISTORY + ' b', 'input': '1, 2'},
    "'input' is '1, 2', which the prompt does not say"),
  'context of another kind': ({'question': 'Hi?', 'context': {'title': 'x'}, 'answer': 'a'},
                              "'context' is dict {'title'"),
  'weight of a row': ({'prompt': 'Hi?', 'response': 'Good.', 'weight': 0.5},
                      "the row has 'weight', 0.5, so it is not to"),
  'a part that is no text': (
    {'messages': [{'role': 'user', 'content': [part_of('Hi?'), {'type': 'image', 'url': 'x'}]},
                  GOOD]}, "has a part {'type': 'image', 'url': 'x'}; needed is text alone"),
  'a part without text': ({'messages': [{'role': 'user', 'content': [{'type': 'text'}]}, GOOD]},
                          "'messages[0]' is NoneType None; needed is a string"),
  'a part that is a string': ({'messages': [{'role': 'user', 'content': ['Hi?']}, GOOD]},
                              "has a part 'Hi?'; needed"),
  'no parts': ({'messages': [{'role': 'user', 'content': []}, GOOD]}, "'messages[0]' is empty"),
}


@pytest.mark.parametrize('row, message', REFUSED.values(), ids=REFUSED)
def test_what_stands_beside_a_layout_and_does_not_fit_is_refused(row, message):
  with pytest.raises(DataError,
                     match=rf'^t\.jsonl row 7: .*{re.escape(message)}.*{re.escape(ADVICE)}$'):
    to_example(row, 't.jsonl row 7')


@pytest.mark.parametrize('field', UNREAD)
@pytest.mark.parametrize('row', [{'prompt': 'Hi?', 'response': 'Good.'},
                                 {'messages': [USER, GOOD]},
                                 {'prompt': 'Hi?', 'chosen': 'Good.', 'rejected': 'Bad.'},
                                 {'text': HISTORY + ' Good.'}],
                         ids=['prompt', 'messages', 'pair', 'text'])
def test_what_cannot_be_rendered_is_refused_unless_empty(row, field):
  for full in ('x', ['x'], {'x': False}):
    with pytest.raises(DataError, match=f'the row has {field!r}, .*, which changes what the text '
                                        'means and is not read'):
      to_example(row | {field: full})
  for empty in (None, '', ' ', [], {}, {'x': None}, [{'x': ''}]):
    assert to_example(row | {field: empty}) == to_example(row)


@pytest.mark.parametrize('field', UNREAD_IN_MESSAGE)
@pytest.mark.parametrize('name', ['messages', 'conversations', 'chosen'])
def test_a_message_with_what_cannot_be_rendered_is_refused(name, field):
  row = ({'messages': [USER, GOOD]} if name != 'chosen'
         else {'chosen': [USER, GOOD], 'rejected': [USER, OTHER]})
  row = {'conversations': row['messages']} if name == 'conversations' else row
  with_field = lambda value: row | {name: [USER, GOOD | {field: value}]}
  with pytest.raises(DataError, match=rf"'{name}\[1\]' has {field!r}, .*'lookup'.* needed is a row "
                                      'without it'):
    to_example(with_field([{'name': 'lookup'}]))
  for empty in (None, '', [], {'name': None, 'arguments': None}):
    assert to_example(with_field(empty)) == to_example(row)


def test_a_call_without_text_says_that_it_is_a_call():
  call = {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'lookup'}}]}
  with pytest.raises(DataError, match=r"'messages\[1\]' has 'tool_calls'"):
    to_example({'messages': [USER, call]})


@pytest.mark.parametrize('flag', LEARNT)
def test_a_turn_that_is_not_to_be_learnt_is_refused(flag):
  chat = lambda value: {'messages': [USER, {'role': 'assistant', 'content': 'Yo.', flag: value},
                                     {'role': 'user', 'content': 'Why?'}, GOOD]}
  for value in (0, False, 0.5):
    with pytest.raises(DataError, match=rf"'messages\[1\]' has {flag!r}, {value}, so it is not to "
                                        'be learnt'):
      to_example(chat(value))
  for value in (1, True, None):
    assert to_example(chat(value)) == demonstration(HI, YO, WHY)


# ---- the same text whatever the layout

TALK = {
  'transcripts': {'chosen': HISTORY + ' yes', 'rejected': HISTORY + ' no'},
  'transcripts and their prompt': {'prompt': HISTORY, 'chosen': HISTORY + ' yes',
                                   'rejected': HISTORY + ' no\n'},
  'a transcript for a prompt': {'prompt': HISTORY, 'chosen': ' yes', 'rejected': ' no'},
  'without spaces': {'prompt': HISTORY, 'chosen': 'yes', 'rejected': 'no\n\n'},
  'not opened': {'prompt': HISTORY.removesuffix('\n\nAssistant:'), 'chosen': ' yes',
                 'rejected': ' no'},
  'stripped': {'prompt': HISTORY.strip(), 'chosen': ' yes', 'rejected': ' no'},
  'Windows newlines': {'prompt': HISTORY.replace('\n', '\r\n'), 'chosen': ' yes\r\n',
                       'rejected': ' no'},
  'messages for responses': {'prompt': HISTORY,
                             'chosen': [{'role': 'assistant', 'content': ' yes'}],
                             'rejected': [{'role': 'assistant', 'content': ' no'}]},
  'a list of responses': {'prompt': HISTORY, 'responses': [' yes', ' no'], 'ranks': [0, 1]},
  'a talk that goes on': {'prompt': '\n\nHuman: Hi?\n\nAssistant:',
                          'chosen': ' Yo.\n\nHuman: Why?\n\nAssistant: yes',
                          'rejected': ' Yo.\n\nHuman: Why?\n\nAssistant: no'},
}


@pytest.mark.parametrize('row', TALK.values(), ids=TALK)
def test_a_talk_is_the_same_whatever_its_layout(row):
  assert to_example(row) == Example((HI, YO, WHY), ('yes', 'no'), (0, 1))


def test_a_response_to_a_transcript_is_the_same_whatever_its_layout():
  rows = [{'prompt': HISTORY, 'completion': ' Good.'}, {'text': HISTORY + ' Good.'},
          {'prompt': HISTORY, 'responses': [' Good.']}]
  assert [to_example(row) for row in rows] == [demonstration(HI, YO, WHY)] * 3


def test_a_prompt_that_speaks_of_an_assistant_loses_nothing():
  row = {'prompt': '\n\nHuman: Write Assistant:', 'response': 'Good.'}
  assert to_example(row) == demonstration(Turn('user', 'Write Assistant:'))


@pytest.mark.parametrize('row, message', [
  ({'prompt': HISTORY, 'chosen': ' yes', 'rejected': 'yes'}, "'chosen' equals 'rejected'"),
  ({'prompt': HISTORY, 'responses': [' yes', 'yes'], 'ranks': [0, 1]}, 'all 2 responses are equal'),
  ({'prompt': HISTORY, 'response': ' '}, "'response' is empty"),
  ({'prompt': HISTORY, 'chosen': ' yes\n\nHuman: Ok', 'rejected': ' no'},
   "'chosen' ends with a turn of the user, 'Ok'"),
  ({'prompt': HISTORY + ' Well,', 'response': ' yes'},
   "the prompt ends with a turn of the assistant, 'Well,'"),
])
def test_responses_to_a_transcript_are_judged_as_its_turns(row, message):
  with pytest.raises(DataError, match=re.escape(message)):
    to_example(row)


@pytest.mark.parametrize('row', [
  {'messages': [CHAT], 'label': 'false'}, {'messages': [CHAT], 'label': 'good'},
  {'messages': [CHAT], 'kto_tag': 'undesirable'},
  {'prompt': 'q', 'completion': 'a', 'kto_tag': '0'},
])
def test_a_label_that_is_no_truth_value_is_refused(row):
  with pytest.raises(DataError, match=r"'(label|kto_tag)' is .*; needed is true or false"):
    to_example(row)
