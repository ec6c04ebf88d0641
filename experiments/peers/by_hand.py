"""The workloads of `bench` in hand-written PyTorch on the CPU, and SFT and generation of `transformers`.

What a careful person writes: fused attention and AdamW, a static cache, sampling by one uniform
number a row (faster here than torch.multinomial), all through `torch.compile`. Models are of the
Llama family. Read next: `on_device.py`, for what runs on GPUs.
"""

import torch
import torch.nn.functional as F
import transformers
from torch import nn


class Attention(nn.Module):
  """Rotary attention, over the sequence or over a cache that it writes."""
  def __init__(self, config):
    super().__init__()
    D, self.N, self.K, self.H = config.width, config.query_heads, config.kv_heads, config.head_width
    self.query, self.key, self.value = (nn.Linear(D, heads * self.H, bias=False) for heads in (self.N, self.K, self.K))
    self.out = nn.Linear(self.N * self.H, D, bias=False)

  def forward(self, x, cos, sin, cache, place, mask):
    heads = lambda y, count: y.view(*x.shape[:2], count, self.H).transpose(1, 2)
    q, k, v = _turn(heads(self.query(x), self.N), cos, sin), _turn(heads(self.key(x), self.K), cos, sin), heads(
      self.value(x), self.K)
    if cache is not None:
      k, v = cache[0].index_copy_(2, place, k), cache[1].index_copy_(2, place, v)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.N != self.K)
    return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def _turn(x, cos, sin):
  first, second = x.chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Backbone(nn.Module):
  """Tokens to the normalised stream, Llama's way."""
  def __init__(self, config):
    super().__init__()
    D, F_ = config.width, config.feedforward_width
    norm = lambda: nn.RMSNorm(D, eps=config.norm_epsilon)
    self.embedding, self.final = nn.Embedding(config.vocab_size, D), norm()
    self.blocks = nn.ModuleList(nn.ModuleDict({
      'before': norm(), 'attention': Attention(config), 'between': norm(), 'gate': nn.Linear(D, F_, bias=False),
      'up': nn.Linear(D, F_, bias=False), 'down': nn.Linear(F_, D, bias=False)}) for _ in range(config.layers))
    radians = config.rope_base ** (-torch.arange(0, config.head_width, 2) / config.head_width)
    angle = torch.arange(config.context_length)[:, None] * radians
    self.register_buffer('cos', angle.cos())
    self.register_buffer('sin', angle.sin())

  def forward(self, tokens, place, caches=None, mask=None):
    x, cos, sin = self.embedding(tokens), self.cos[place], self.sin[place]
    for i, block in enumerate(self.blocks):
      x = x + block['attention'](block['before'](x), cos, sin, None if caches is None else caches[i], place, mask)
      y = block['between'](x)
      x = x + block['down'](F.silu(block['gate'](y)) * block['up'](y))
    return self.final(x)


class Model(nn.Module):
  """Backbone and head: the vocabulary, or one number."""
  def __init__(self, config, outputs):
    super().__init__()
    self.backbone, self.head = Backbone(config), nn.Linear(config.width, outputs, bias=False)

  def forward(self, tokens, start=0):
    return self.head(self.backbone(tokens, torch.arange(tokens.shape[1]))[:, start:])


def _logprobs(model, tokens, start):
  """Of the tokens from `start` on, each given all before it."""
  logits = model(tokens, start - 1)[:, :-1]
  return -F.cross_entropy(logits.flatten(0, 1), tokens[:, start:].flatten(), reduction='none').view(len(tokens), -1)


class Torch:
  """The four workloads in hand-written PyTorch: `sft()`, `reward()`, `generate()` and `ppo()` each do one round."""
  def __init__(self, config, batch):
    torch.manual_seed(0)
    self.config, self.batch = config, batch
    draw = lambda *shape: torch.randint(0, config.vocab_size, shape)
    self.rows, self.pairs = draw(batch.sft_rows, batch.tokens), draw(2 * batch.reward_pairs, batch.tokens)
    self.prompts = draw(batch.generate_prompts, batch.prompt_tokens)
    self.asked = draw(batch.ppo_prompts, batch.prompt_tokens)
    self.policy, self.reference = Model(config, config.vocab_size), Model(config, config.vocab_size)
    self.scorer, self.value, self.judge = Model(config, 1), Model(config, 1), Model(config, 1)
    self.sft_loss, self.reward_loss = torch.compile(self._sft_loss), torch.compile(self._reward_loss)
    self.ppo_loss, self.look_back, self.step = map(torch.compile, (self._ppo_loss, self._look_back, self._step))
    self.optimizers = {name: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True) for name, parameters in (
      ('sft', self.policy.parameters()), ('reward', self.scorer.parameters()),
      ('ppo', [*self.policy.parameters(), *self.value.parameters()]))}

  def _update(self, name, loss):
    optimizer = self.optimizers[name]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]['params'], 1.0)
    optimizer.step()

  def _sft_loss(self, rows):
    return -_logprobs(self.policy, rows, 1).mean()

  def _reward_loss(self, pairs):
    score = self.scorer(pairs)[:, -1, 0].view(-1, 2)
    return -F.logsigmoid(score[:, 0] - score[:, 1]).mean()

  def sft(self):
    self._update('sft', self.sft_loss(self.rows))

  def reward(self):
    self._update('reward', self.reward_loss(self.pairs))

  def generate(self):
    return self._answer(self.prompts, self.batch.new_tokens)

  @torch.no_grad()
  def _answer(self, prompts, new_tokens):
    (B, P), c = prompts.shape, self.config
    caches = [tuple(torch.zeros(B, c.kv_heads, P + new_tokens, c.head_width) for _ in range(2)) for _ in range(c.layers)]
    slot = torch.arange(P + new_tokens)
    said = [self._step(prompts, torch.arange(P), caches, slot <= torch.arange(P)[:, None])]
    for t in range(P, P + new_tokens - 1):
      said.append(self.step(said[-1], torch.tensor([t]), caches, (slot <= t)[None]))
    return torch.cat([prompts, *said], 1)

  def _step(self, tokens, place, caches, mask):
    logits = self.policy.head(self.policy.backbone(tokens, place, caches, mask)[:, -1])
    cumulative = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    return (cumulative <= torch.rand(len(tokens), 1) * cumulative[:, -1:]).sum(-1, keepdim=True)

  @torch.no_grad()
  def _look_back(self, tokens):
    """What PPO needs of every response token: log-probability, value, advantage, return."""
    P = self.batch.prompt_tokens
    old, reference = _logprobs(self.policy, tokens, P), _logprobs(self.reference, tokens, P)
    values, score = self.value(tokens, P - 1)[:, :-1, 0], self.judge(tokens)[:, -1, 0]
    reward = -0.05 * (old - reference)
    reward[:, -1] += score
    after = torch.zeros_like(score)
    advantages, following = [], after
    for t in reversed(range(reward.shape[1])):
      after = reward[:, t] + following - values[:, t] + 0.95 * after
      following = values[:, t]
      advantages.append(after)
    advantage = torch.stack(advantages[::-1], 1)
    return old, values, (advantage - advantage.mean()) / (advantage.std() + 1e-8), advantage + values

  def _ppo_loss(self, tokens, old, old_values, advantage, returns):
    P = self.batch.prompt_tokens
    ratio = (_logprobs(self.policy, tokens, P) - old).exp()
    values = self.value(tokens, P - 1)[:, :-1, 0]
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    return policy + 0.05 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean()

  def ppo(self):
    tokens = self._answer(self.asked, self.batch.new_tokens)
    lessons = (tokens, *self.look_back(tokens))
    for _ in range(self.batch.epochs):
      for some in zip(*(x.chunk(self.batch.minibatches) for x in lessons)):
        self._update('ppo', self.ppo_loss(*some))


class Transformers:
  """SFT and generation of `transformers`, compiled."""
  def __init__(self, config, batch):
    torch.manual_seed(0)
    self.batch = batch
    self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.feedforward_width,
      num_hidden_layers=config.layers, num_attention_heads=config.query_heads, num_key_value_heads=config.kv_heads,
      head_dim=config.head_width, max_position_embeddings=config.context_length, tie_word_embeddings=config.tied,
      bos_token_id=None, eos_token_id=None, pad_token_id=0))
    self.rows = torch.randint(0, config.vocab_size, (batch.sft_rows, batch.tokens))
    self.prompts = torch.randint(0, config.vocab_size, (batch.generate_prompts, batch.prompt_tokens))
    self.loss = torch.compile(lambda rows: self.model(input_ids=rows, labels=rows, use_cache=False).loss)
    self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    self.eager = self.model.forward

  def sft(self):
    self.model.forward = self.eager
    self.optimizer.zero_grad()
    self.loss(self.rows).backward()
    torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
    self.optimizer.step()

  @torch.no_grad()
  def generate(self):
    if not hasattr(self, 'compiled'):
      self.compiled = torch.compile(self.eager)
    self.model.forward = self.compiled
    return self.model.generate(self.prompts, attention_mask=torch.ones_like(self.prompts), do_sample=True, top_k=0,
                               max_new_tokens=self.batch.new_tokens, min_new_tokens=self.batch.new_tokens,
                               cache_implementation='static')
