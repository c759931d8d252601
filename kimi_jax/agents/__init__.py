"""Agents on Kimi models: a loop of tool calls with limits, and swarms of sub-agents."""

from kimi_jax.agents.engine_model import EngineModel as EngineModel
from kimi_jax.agents.file_tools import files as files
from kimi_jax.agents.heavy import Heavy as Heavy
from kimi_jax.agents.heavy import heavy as heavy
from kimi_jax.agents.limits import Limits as Limits
from kimi_jax.agents.loop import Agent as Agent
from kimi_jax.agents.loop import Run as Run
from kimi_jax.agents.mcp_tools import mcp_tools as mcp_tools
from kimi_jax.agents.model import BusyError as BusyError
from kimi_jax.agents.model import Call as Call
from kimi_jax.agents.model import ChatModel as ChatModel
from kimi_jax.agents.model import ContextLengthError as ContextLengthError
from kimi_jax.agents.model import Mode as Mode
from kimi_jax.agents.model import Parts as Parts
from kimi_jax.agents.model import Reply as Reply
from kimi_jax.agents.model import Usage as Usage
from kimi_jax.agents.openai_model import OpenAIModel as OpenAIModel
from kimi_jax.agents.python_tool import python as python
from kimi_jax.agents.replay import read_trace as read_trace
from kimi_jax.agents.scripted import ScriptedModel as ScriptedModel
from kimi_jax.agents.swarm import swarm as swarm
from kimi_jax.agents.tools import Tool as Tool
from kimi_jax.agents.tools import ToolError as ToolError
from kimi_jax.agents.tools import Toolset as Toolset
from kimi_jax.agents.tools import tool as tool
from kimi_jax.agents.trace import Trace as Trace
