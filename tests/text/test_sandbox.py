"""A hostile template gets nowhere: not into Python, not into its arguments, not into endless work."""

import tracemalloc

import pytest
from jinja2.exceptions import SecurityError, TemplateRuntimeError, TemplateSyntaxError

from tokenspeed.engine.text import sandbox
from tokenspeed.engine.text.sandbox import BoundedEnvironment, TemplateRefusal


def render(source, **variables):
    environment = BoundedEnvironment()
    return environment.render(environment.compile_template(source), variables)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (''|attr('__class__')).x }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__code__.x }}",
        "{{ dict.mro() }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
        "{{ '{0.__class__}'.format_map({}) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace(__call__=1) }}",
        "{{ namespace({'_x': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ self.__init__.x }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for x in messages %}{{ loop.__class__.__mro__ }}{% endfor %}",
    ],
)
def test_python_and_the_arguments_are_out_of_reach(source):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(SecurityError):
        render(source, messages=messages)
    assert messages == [{"role": "user", "content": "x"}]


DOUBLING = "{%% set ns = namespace(s=%s) %%}{%% for i in range(200) %%}{%% set ns.s = %s %%}{%% endfor %%}"

ENDLESS = {
    "nested loops": "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for a in R %}{% for b in R if b > a %}x{% endfor %}{% endfor %}",
    "a recursive loop": "{% for a in K recursive %}{{ loop(K) if loop.depth == 1 }}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "filters in filters": "{% set s = ['a' * 50000] %}{% for a in K %}{{ s | map('upper') | join }}{% endfor %}",
    "filters in loops": "{% set s = 'a' * 1000000 %}{% for a in K %}{% set t = s | upper %}{% endfor %}",
    "methods in loops": "{% set s = 'a' * 1000000 %}{% for a in K %}{% set t = s.upper() %}{% endfor %}",
    "copies in loops": "{% set s = 'a' * 1000000 %}{% for a in K %}{% set t = s + 'a' %}{% endfor %}",
    "doubling by ~": DOUBLING % ("'x'", "ns.s ~ ns.s"),
    "doubling by +": DOUBLING % ("'x'", "ns.s + ns.s"),
    "doubling a list": DOUBLING % ("[1]", "ns.s + ns.s"),
    "doubling by join": DOUBLING % ("'x'", "[ns.s, ns.s] | join"),
    "squaring a number": DOUBLING % ("10", "ns.s * ns.s"),
    "a long product": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ [1] * 10000000000 }}",
    "a long product, turned": "{{ 10000000000 * 'a' }}",
    "a high power": "{{ 10 ** 10000000000 }}",
    "long output": "{% set s = 'a' * 1000000 %}{% for a in K %}{{ s }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_work_is_cut_short_within_the_limits(name, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 10_000)  # the limits' own sizes would only make the tests slow
    monkeypatch.setattr(sandbox, "MAX_SIZE", 1 << 22)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateRuntimeError, match=r"the chat template (takes more than|makes a value)"):
            render(ENDLESS[name].replace("R", "range(100000)").replace("K", "range(1000)"))
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", ["{% for x in range(999999999) %}{% endfor %}", "{{ range(10 ** 9) | list }}"])
def test_a_huge_range_is_refused(source):
    with pytest.raises(OverflowError, match="Range too big"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (9, 1) }}",
        "{{ ''.center(9) }}",
        "{{ ''.zfill(9) }}",
        "{{ 'a'.ljust(9) }}",
        "{{ '{:9}'.format(1) }}",
        "{{ [1] | tojson(indent=1000000) }}",
    ],
)
def test_what_pads_to_a_width_is_refused(source):
    with pytest.raises(SecurityError):
        render(source)


@pytest.mark.parametrize("source", ["{{ '' | center(9) }}", "{{ '%9d' | format(1) }}", "{{ lipsum | indent(9) }}"])
def test_filters_that_pad_do_not_exist(source):
    with pytest.raises(TemplateSyntaxError, match="No filter named"):
        render(source)


def test_a_macro_without_end_is_an_error():
    with pytest.raises(RecursionError):
        render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")


def test_each_render_has_its_own_budget(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    environment = BoundedEnvironment()
    template = environment.compile_template("{% for i in range(400) %}x{% endfor %}")
    assert [environment.render(template, {}) for _ in range(3)] == ["x" * 400] * 3


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for x in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for x in m if x != 'b' %}{{ loop.previtem }}{{ x }}{% else %}none{% endfor %}", "aac"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k ~ v ~ none }}{% endfor %}", "a1Noneb2None"),
        ("{% for k in {'a': 1} %}{{ k }}{% endfor %}{% for x in nothing %}x{% else %}empty{% endfor %}", "aempty"),
        ("{% for x in m recursive %}{{ x if x is string else loop(x) }}{% endfor %}", "abc"),
        ("{% for x in m %}{% if loop.first %}{% continue %}{% endif %}{{ x }}{% break %}{% endfor %}", "b"),
        ("{% set ns = namespace(n=0) %}{% for x in m %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ m | map('upper') | join('-') }} {{ 'a%s' % 1 }} {{ 7 % 4 }} {{ '=' * 3 }}", "A-B-C a1 3 ==="),
        ("{{ {'a': '<é>'} | tojson }} {{ [1] | tojson(indent=1) }}", '{"a": "<é>"} [\n 1\n]'),
        ("    {% if true %}\nline\n    {% endif %}\nend", "line\nend"),
        ("{{ strftime_now('%%') }}{{ dict(a=1).a }}", "%1"),
    ],
)  # fmt: skip
def test_what_templates_rightly_use_works_as_in_jinja(source, expected):
    assert render(source, m=["a", "b", "c"]) == expected


def test_raise_exception_carries_its_message():
    with pytest.raises(TemplateRefusal, match="no way"):
        render("{{ raise_exception('no way') }}")
