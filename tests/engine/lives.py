"""Random lives of agents on one engine: conversations that go on, are edited, repeated, forked, cut off."""

from dataclasses import dataclass, field
from random import Random

from lab import ENDS, Lab, Talk

VOCABULARY = 300


@dataclass
class Agent:
    """A conversation. messages: question, answer, question, ...; reasons: the first half of an answer is not kept."""

    system: list[int]
    opening: list[int]  # what the template puts before an answer
    reasons: bool
    messages: list[list[int]] = field(default_factory=list)
    talk: Talk | None = None

    def prompt(self) -> tuple[list[int], list[int]]:
        """With its stable boundaries: the system prompt's end, the last question's, its own."""
        text = [*self.system, *(id for message in self.messages for id in message)]
        return text + self.opening, [len(self.system), len(text), len(text) + len(self.opening)]

    def listen(self) -> None:
        answer = self.talk.outputs[0]
        self.messages.append(self.opening + (answer[len(answer) // 2 :] if self.reasons else answer))
        self.talk = None


def live(lab: Lab, seed: int, turns: int, agents: int = 4) -> None:
    """Until `turns` requests were made and everything came to its end."""
    random = Random(seed)

    def text(least: int, most: int) -> list[int]:
        return [random.randrange(VOCABULARY) for _ in range(random.randint(least, most))]

    systems, opening = [text(64, 100), text(20, 90)], text(2, 5)
    people = [Agent(random.choice(systems), opening, random.random() < 0.4) for _ in range(agents)]
    room = lab.engine.limits.max_tokens
    made = 0
    while made < turns or lab.engine.has_work:
        for agent in people:
            if agent.talk and agent.talk.finished:
                agent.listen()
            elif agent.talk and random.random() < 0.01:
                lab.engine.abort(agent.talk.request.id)
        idle = [agent for agent in people if agent.talk is None]
        if made < turns and idle and (random.random() < 0.5 or not lab.engine.has_work):
            agent = random.choice(idle)
            speak(agent, random, text)
            prompt, boundaries = agent.prompt()
            if len(prompt) + 64 > room:  # a new conversation
                agent.messages = [text(5, 60)]
                prompt, boundaries = agent.prompt()
            agent.talk = lab.submit(
                prompt,
                boundaries if random.random() < 0.8 else (),
                name_space=random.choice(["", "", "", "other"]),
                n=random.choice([1, 1, 1, 1, 2, 3]),
                max_tokens=random.randint(1, 40),
                stop_token_ids=ENDS if random.random() < 0.6 else (),
                prompt_logprobs=0 if random.random() < 0.08 else None,
                temperature=random.choice([0.0, 1.0]),
            )
            made += 1
        if lab.engine.has_work:
            lab.engine.step()


def speak(agent: Agent, random: Random, text) -> None:
    """The user's next move."""
    dice = random.random()
    if agent.messages and dice < 0.1:
        del agent.messages[-1:]  # asks the same again
    elif len(agent.messages) > 1 and dice < 0.3:
        del agent.messages[2 * random.randrange(len(agent.messages) // 2) :]  # edits an earlier question
        agent.messages.append(text(1, 60))
    else:
        agent.messages.append(text(1, 60))
