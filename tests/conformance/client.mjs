// OpenAI's npm client against the server of OPENAI_BASE_URL; prints one line of JSON.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.argv[2];
const tools = JSON.parse(process.argv[3]);
const messages = [{ role: "user", content: "Hello" }];
const found = {};

found.models = (await client.models.list()).data.map((each) => each.id);
const fields = { model, messages, max_tokens: 16, seed: 4 };
found.whole = (await client.chat.completions.create(fields)).choices[0].message.content;
found.streamed = "";
const stream = await client.chat.completions.create({
  ...fields, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) found.usage = chunk.usage;
}
// The client's own helper folds the chunks of a call.
const runner = client.chat.completions.stream({
  ...fields, max_tokens: 400, tools, tool_choice: "required", parallel_tool_calls: false,
});
const folded = (await runner.finalChatCompletion()).choices[0];
found.call = folded.message.tool_calls[0].function;
found.reason = folded.finish_reason;
found.events = [];
const response = client.responses.stream({ model, input: "Hello", max_output_tokens: 8, temperature: 0 });
response.on("event", (event) => found.events.push(event.type));
found.response = (await response.finalResponse()).output_text;
try {
  await client.chat.completions.create({ ...fields, temperature: 9 });
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, param: error.param };
}
console.log(JSON.stringify(found));
