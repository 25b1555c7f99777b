"""Reads problems of your own: a JSONL file, one problem a line, each a graph of quantities with sentences for them.

    {"nodes": [{"name": "Ann's apples", "formula": "5", "statement": "Ann picked 5 apples."},
               {"name": "Ben's apples", "formula": "2 * Ann's apples", "statement": "Ben picked twice as many as Ann."},
               {"name": "the total", "formula": "Ann's apples + Ben's apples"}],
     "target": "the total", "ask": "How many apples did they pick together?"}

name       what worked answers call the quantity; any text of at most 100 characters but "it", "and" and numbers, with a
           letter in it, without + - * / ( ) = and without a full stop before a blank or the end. Where all names of a
           problem are single words, formulas in answers use the names; else each gets a letter, of 52 less those that are
           names
formula    numbers, names, + - * / and parentheses, with the usual precedence; its parents are the names in it. Numbers
           have at most nine digits before the point and four behind it; a minus may stand right before a number
statement  the sentence that tells it; left out where the reader has to infer the formula. The statements, in the order of
           the file, and then `ask` are the question
target     the name of the quantity asked for. Nodes it does not need are redundant premises

Every operation is rounded to four decimals (see `dag`): with thirds, prefer `total * 2 / 3` to a node for one
third. Where the answer needs a division or a decimal number it is scored with a relative tolerance of 1e-4, else exactly.
docs/own_problems.jsonl is an example.
"""
import re
import string
from decimal import Decimal

from minibridge.arithmetic import TOLERANCE
from minibridge.config import KINDS, InputError, numbered
from minibridge.dag import Expr, Node, Number, Problem, evaluate, leaves, rounded, solving_order
from minibridge.formula import plain

LARGEST = 10**9
MOST_TOKENS = 100  # of a formula; it also bounds how deep its parentheses go
SYMBOLS = "+-*/()"
NO_NAME = re.compile(r"[-+*/()=]|\.(\s|$)|^(it|and)$", re.IGNORECASE)
MARKS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed")  # of an answer: no text may hold them
MOST_NODES, LONGEST_NAME = 1000, 100
STOPS, CLOSERS = tuple(".!?。！？"), "\"'”’»)"  # how a statement ends


def _is_statement(text: str) -> bool:
    return bool(re.search(r"\w", text)) and text.rstrip(CLOSERS).endswith(STOPS)


def read(path: str) -> list[Problem]:
    """The problems of a file. Raises InputError("path:line: node 'name': what") for the first line that is wrong."""
    problems = []
    for where, record in numbered(path):
        try:
            problems.append(problem(record))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    return problems


def problem(record: dict) -> Problem:
    """A problem from one line. Raises InputError, which names the node where there is one to name."""
    _check_fields(record, {"nodes": list, "target": str, "ask": str})
    nodes = _nodes(record["nodes"])
    solving = _file_order(nodes)
    if record["target"] not in nodes:
        raise InputError(f"target: no node is called {record['target']!r}")
    _check_values(nodes, solving)
    needed = {record["target"]}
    for key in reversed(solving):
        if key in needed:
            needed.update(nodes[key].parents)
    order = [key for key in solving if key in needed]
    return _checked(Problem("own", nodes, tuple(order), tuple(key for key in nodes if key not in needed),
                            sum(len(leaves(nodes[key].expr)) - 1 for key in order),
                            TOLERANCE if any(_may_round(nodes[key].expr) for key in order) else 0.0, record["ask"]))


def _checked(problem: Problem) -> Problem:
    if not problem.ask or problem.ask != _one_line(problem.ask):
        raise InputError("ask: must be one line of text")
    _check_marks("ask", problem.ask)
    letters = [letter for letter in string.ascii_letters if letter not in problem.nodes]
    if len(problem.nodes) > len(letters) and not problem.symbolic:
        raise InputError(f"nodes: {len(problem.nodes)}, more than the {len(letters)} letters; names of one word need none")
    if problem.drift > TOLERANCE:
        raise InputError(f"node {problem.target!r}: rounding every step to four decimals puts the answer off by "
                         f"{problem.drift:.1g} of its value")
    return problem


def _nodes(records: list) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    seen: set[str] = set()
    if len(records) > MOST_NODES:
        raise InputError(f"nodes: {len(records)}, more than {MOST_NODES}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise InputError(f"nodes: number {number} is not an object")
        name = record.get("name")
        if not isinstance(name, str) or name != _one_line(name) or not _usable(name):
            raise InputError(f"nodes: number {number} has no usable name: {str(name)[:80]!r}{_fault(name)}")
        if plain(name) in seen:
            raise InputError(f"node {name!r}: a second node of this name, upper and lower case being one")
        seen.add(plain(name))
        try:
            nodes[name] = _node(name, record)
        except InputError as error:
            raise InputError(f"node {name!r}: {error}") from None
    return nodes


def _usable(name: str) -> bool:
    return (len(name) <= LONGEST_NAME and len(name.lower()) == len(name) and any(map(str.isalpha, name))
            and not NO_NAME.search(plain(name)) and not any(mark in name for mark in MARKS))


def _fault(name: object) -> str:
    """Why a name is turned down, where its first 80 characters may not show it."""
    if not isinstance(name, str):
        return ""
    if len(name) > LONGEST_NAME:
        return f"..., longer than {LONGEST_NAME} characters"
    fault = NO_NAME.search(plain(name)) or re.search("|".join(map(re.escape, MARKS)) + r"|^\s+|\s+$|\s\s+", name)
    return f", because of {fault[0]!r}" if fault else ""


def _node(name: str, record: dict) -> Node:
    _check_fields(record, {"name": str, "formula": str, "statement": str}, optional="statement")
    text = record.get("statement", "")
    if "statement" in record and (text != _one_line(text) or not _is_statement(text)):
        raise InputError("statement: must be one line that ends with . ! or ?")
    _check_marks("statement", text)
    node = Node(name, "", parse(record["formula"]), stated=bool(text), text=text)
    if not text and not node.parents:
        raise InputError("statement: missing, and nobody can infer a number")
    return node


def _check_fields(record: dict, kinds: dict[str, type], optional: str = "") -> None:
    for field in (*kinds, *record):
        if field not in kinds:
            raise InputError(f"unknown field {field!r}")
        if not (isinstance(record.get(field), kinds[field]) or field == optional and field not in record):
            raise InputError(f"field {field!r} must be {KINDS[kinds[field]]}")


def _check_marks(field: str, text: str) -> None:
    if any(mark in text for mark in MARKS):
        raise InputError(f"{field}: holds one of {', '.join(MARKS)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _file_order(nodes: dict[str, Node]) -> list[str]:
    """All keys, each after its parents, and otherwise as they stand in the file."""
    solving_order(nodes)  # InputError if there is no such order
    solved: dict[str, bool] = {}
    while len(solved) < len(nodes):
        key = next(key for key in nodes if key not in solved and all(parent in solved for parent in nodes[key].parents))
        solved[key] = True
    return list(solved)


def _check_values(nodes: dict[str, Node], solving: list[str]) -> None:
    values: dict[str, Number] = {}
    for key in solving:
        try:
            values[key] = evaluate(nodes[key].expr, values)
        except ArithmeticError:
            raise InputError(f"node {key!r}: division by zero, or a result of more than 24 digits") from None
        if abs(values[key]) >= LARGEST:  # also keeps a few lines of squares from filling the memory
            raise InputError(f"node {key!r}: its value reaches {LARGEST}")


def _may_round(expr: Expr) -> bool:
    if isinstance(expr, tuple):
        return expr[0] == "/" or any(map(_may_round, expr[1:]))
    return isinstance(expr, Decimal)


# --- formulas: sum = product (+|- product)*, product = atom (*|/ atom)*, atom = number | name | (sum) ---------


def parse(text: str) -> Expr:
    """"2 * (Ann's apples - 1)" -> ("*", 2, ("-", "Ann's apples", 1)). Raises InputError for anything else than a formula."""
    tokens = [_one_line(token) for token in re.findall(r"[-+*/()]|[^-+*/()]+", text) if token.strip()]
    if len(tokens) > MOST_TOKENS:
        raise InputError(f"formula: {len(tokens)} parts, more than {MOST_TOKENS}; split it into several nodes")
    expr = _sum(tokens)
    if tokens:
        raise InputError(f"formula: unexpected {tokens[0]!r} in {text!r}")
    return expr


def _sum(tokens: list[str]) -> Expr:
    expr = _product(tokens)
    while tokens and tokens[0] in ("+", "-"):
        expr = _joined(tokens.pop(0), expr, _product(tokens))
    return expr


def _product(tokens: list[str]) -> Expr:
    expr = _atom(tokens)
    while tokens and tokens[0] in ("*", "/"):
        expr = _joined(tokens.pop(0), expr, _atom(tokens))
    return expr


def _joined(op: str, left: Expr, right: Expr) -> Expr:
    """a + b + c is one sum of three: operations of one kind are applied from left to right anyway."""
    return (*left, right) if isinstance(left, tuple) and left[0] == op else (op, left, right)


def _atom(tokens: list[str]) -> Expr:
    token = tokens.pop(0) if tokens else ""
    if token == "-" and tokens and _is_number(tokens[0]):
        return -_number(tokens.pop(0))
    if token == "(":
        expr = _sum(tokens)
        if not tokens or tokens.pop(0) != ")":
            raise InputError("formula: a parenthesis is not closed")
        return expr
    if token in SYMBOLS or not token:
        raise InputError(f"formula: a number, a name or a parenthesis is missing before {token or 'the end'!r}")
    return _number(token) if _is_number(token) else token


def _is_number(token: str) -> bool:
    return bool(re.fullmatch(r"[0-9]+(\.[0-9]+)?", token))


def _number(token: str) -> Number:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,4})?", token):
        raise InputError(f"formula: {token[:30]} has more than nine digits before the point or four behind it")
    return rounded(Decimal(token))
