"""Programs of the tests of agents. The first one is that of the documentation."""

TWO_TURNS = """\
import json, os
from openai import OpenAI

client = OpenAI()  # finds OPENAI_BASE_URL and OPENAI_API_KEY
row = json.load(open(os.environ["ROLL_GSPO_ROW"]))
messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": row["question"]}]
first = client.chat.completions.create(model="policy", messages=messages, max_tokens=12)
messages += [first.choices[0].message, {"role": "user", "content": "Sure?"}]
parts = client.chat.completions.create(
    model="policy", messages=messages, max_completion_tokens=9, stream=True, stream_options={"include_usage": True}
)
text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
messages += [{"role": "assistant", "content": text.strip()}, {"role": "user", "content": "Last?"}]
last = client.chat.completions.create(model="policy", messages=messages, max_tokens=5)
client.post("/reward", body={"reward": 0.5, "metrics": {"length": len(text)}}, cast_to=object)
client.post("/reward", body={"reward": 0.25, "done": True}, cast_to=object)
"""

# Needs no packages, so that it starts fast. The first argument is what it does after the answer.
ONE_TURN = """\
import json, os, sys, time, urllib.request

def post(path, body):
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + path, json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(request))

row = json.load(open(os.environ["ROLL_GSPO_ROW"]))
messages = [{"role": "user", "content": row["question"]}]
if row["then"] != "ask nothing":
    post("/chat/completions", {"messages": messages, "max_tokens": 4})
if row["then"] == "print":
    print("thinking...")
    print(json.dumps({"reward": float(os.environ["ROLL_GSPO_SEED"])}))
if row["then"] == "die":
    post("/reward", {"reward": 1.0})
    raise KeyError("no such page")
if row["then"] == "hang":
    time.sleep(60)
"""

# The reward is the share of digits in two answers.
RUN = (
    ONE_TURN.partition("row =")[0]
    + """\
if "FAIL" in os.environ:
    raise RuntimeError("broken")
row = json.load(open(os.environ["ROLL_GSPO_ROW"]))
messages, reward = list(row["messages"]), 0.0
for _ in range(2):
    answer = post("/chat/completions", {"messages": messages, "max_tokens": 16})["choices"][0]["message"]
    reward += sum(c.isdigit() for c in answer["content"]) / (len(answer["content"]) + 1)
    messages += [answer, {"role": "user", "content": "Again."}]
post("/reward", {"reward": reward, "metrics": {"answers": 2}})
"""
)
