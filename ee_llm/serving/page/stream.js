// The server's API: its model, and the tokens of a request as they arrive.

/** An error whose message is for the user; status is 0 if there was no response. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Return a function that takes the next part of a stream and returns the complete events in it. */
export function makeEventReader() {
  let rest = "";
  return (part) => {
    const events = (rest + part).split("\n\n");
    rest = events.pop();
    return events.filter((one) => one.startsWith("data: ")).map((one) => one.slice(6));
  };
}

/** Return the description of the server's model. */
export async function fetchModel(key) {
  const response = await send("v1/models", { headers: headersFor(key) });
  return (await response.json()).data[0];
}

/**
 * Yield the tokens of a completion or a chat, in lists of those that arrived together.
 *
 * A token has its text, exit and confidence; the last one also has the summary of the choice, and
 * why it ended.
 */
export async function* streamTokens(path, body, key, signal) {
  const response = await send(path, {
    method: "POST",
    headers: { ...headersFor(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const readEvents = makeEventReader();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the text was complete.");
    const events = readEvents(value);
    const tokens = events.filter((one) => one !== "[DONE]").flatMap(tokensOf);
    if (tokens.length) yield tokens;
    if (events.includes("[DONE]")) return;
  }
}

/** Return the tokens of an event: one, or none for the role of a chat. */
export function tokensOf(event) {
  const chunk = JSON.parse(event);
  if (chunk.error) throw new ServerError(chunk.error.message);
  const [choice] = chunk.choices;
  if (!choice?.ee) return [];
  return choice.ee.exits.map((exit, index) => ({
    text: choice.text ?? choice.delta.content ?? "",
    exit,
    confidence: choice.ee.confidences[index],
    summary: choice.finish_reason ? choice.ee : null,
    finishReason: choice.finish_reason,
  }));
}

function headersFor(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not respond. Is it still running?");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  throw new ServerError(found?.error?.message ?? `The server responded ${response.status}.`, response.status);
}
