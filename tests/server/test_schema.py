"""Requests generated from the OpenAPI schema, valid and not: whatever comes, the server answers and says why not."""

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

EXAMPLES = 10  # of each operation, valid and again not
MAX_TOKENS = 4  # a generated body may ask for thousands
# What bounds an answer, by the path that gives it.
ANSWERS = dict.fromkeys(("/v1/chat/completions", "/v1/completions", "/v1/messages"), "max_tokens")
ANSWERS |= {"/v1/responses": "max_output_tokens"}
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_no_request_of_the_schema_makes_the_server_fail(server):
    statuses: dict[str, set[int]] = {}

    def check(case) -> None:
        if case.path in ANSWERS and isinstance(case.body, dict):
            bound = ANSWERS[case.path]
            asked = case.body.get(bound)
            if asked is None or (isinstance(asked, int) and asked > MAX_TOKENS):
                case.body[bound] = MAX_TOKENS
        response = case.call(base_url=server.url, timeout=30)
        case.validate_response(response, checks=[not_a_server_error])
        statuses.setdefault(case.path, set()).add(response.status_code)

    for result in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
        operation = result.ok()
        # Without a body there is nothing to get wrong.
        for mode in list(GenerationMode) if list(operation.body) else [GenerationMode.POSITIVE]:
            SETTINGS(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert statuses.keys() >= ANSWERS.keys() | {"/tokenize", "/detokenize", "/v1/abort", "/v1/models", "/metrics"}
    assert {200, 400} <= statuses["/v1/completions"] | statuses["/v1/chat/completions"]
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
