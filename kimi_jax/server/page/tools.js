// The tool that this page offers to the model and runs itself: a sum of two checked numbers.

const integer = { type: "integer" };
const parameters = { type: "object", properties: { a: integer, b: integer }, required: ["a", "b"] };

/** The calculator, as requests declare it, and as the small digits model was trained with it. */
export const CALCULATOR = [{ type: "function", function: { name: "add", description: "Add two numbers.", parameters } }];

/** Returns the result of a call as a text; what is wrong with the call is a result too, which the model reads. */
export function result(name, args) {
  if (name !== "add") return `error: there is no tool ${name}`;
  let numbers;
  try {
    numbers = JSON.parse(args);
  } catch {
    return "error: the arguments are not JSON";
  }
  const { a, b } = numbers ?? {};
  if (!Number.isSafeInteger(a) || !Number.isSafeInteger(b)) return "error: expected integers a and b";
  return String(BigInt(a) + BigInt(b));
}
