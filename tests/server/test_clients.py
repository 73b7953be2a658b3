"""Frameworks over OpenAI's and Anthropic's clients, unchanged, in a tool loop with the shipped model."""

import asyncio

import agents
import pytest
from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is 12 plus 30?"
KEY = "unused"


class Thing(BaseModel):
    size: int
    tags: list[bool]


def calc(a: float, op: str, b: float) -> str:
    """Do arithmetic."""
    assert op == "+"
    return str(int(a + b))


def test_pydantic_ai_over_all_three_apis(server):
    openai = OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY)
    models = [OpenAIChatModel("tiny", provider=openai), OpenAIResponsesModel("tiny", provider=openai)]
    models.append(AnthropicModel("tiny", provider=AnthropicProvider(base_url=server.url, api_key=KEY)))
    for model in models:
        agent = Agent(model, tools=[calc], model_settings={"temperature": 0, "max_tokens": 200})
        answer = agent.run_sync(QUESTION)
        assert "42" in answer.output
        again = agent.run_sync("Hello!", message_history=answer.all_messages())
        assert again.output


@pytest.mark.parametrize("responses", [False, True])
def test_langgraph_agent_over_langchain_openai(server, responses):
    model = ChatOpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key=KEY,
        temperature=0,
        use_responses_api=responses,
        max_tokens=200,
    )
    graph = create_agent(model, [tool(calc)])
    found = graph.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    assert [message.type for message in found["messages"]] == ["human", "ai", "tool", "ai"]
    assert "42" in found["messages"][-1].text
    pieces = [piece.text for piece in model.stream("Remember: The price of kelp is 551.")]
    assert "".join(pieces) == "OK."


def test_langgraph_agent_over_langchain_anthropic(server):
    model = ChatAnthropic(model="tiny", base_url=server.url, api_key=KEY, max_tokens=200)
    graph = create_agent(model, [tool(calc)])
    found = graph.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    assert found["messages"][1].tool_calls and found["messages"][2].type == "tool"


def test_langchain_structured_output(server):
    model = ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key=KEY, temperature=1, max_tokens=400)
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Thing, method=method).invoke(QUESTION), Thing)


def test_openai_agents_over_both_apis(server):
    agents.set_tracing_disabled(True)
    settings = agents.ModelSettings(temperature=0, max_tokens=200)
    tools = [agents.function_tool(calc, strict_mode=False)]

    async def ask(kind) -> None:
        model = kind("tiny", AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY))
        agent = agents.Agent("tiny agent", model=model, tools=tools, model_settings=settings)
        answer = await agents.Runner.run(agent, QUESTION)
        assert "42" in answer.final_output
        again = await agents.Runner.run(agent, [*answer.to_input_list(), {"role": "user", "content": "Hello!"}])
        assert again.final_output
        streamed = agents.Runner.run_streamed(agent, QUESTION)
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds and "42" in streamed.final_output

    for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
        asyncio.run(ask(kind))


def test_openai_agents_typed_output(server):
    agents.set_tracing_disabled(True)
    model = agents.OpenAIResponsesModel("tiny", AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY))
    settings = agents.ModelSettings(temperature=1, max_tokens=400)
    agent = agents.Agent("tiny agent", model=model, output_type=Thing, model_settings=settings)
    assert isinstance(asyncio.run(agents.Runner.run(agent, QUESTION)).final_output, Thing)
