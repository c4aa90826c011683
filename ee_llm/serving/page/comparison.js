// Compare two generations: where their texts diverge, and how fast their tokens arrive.

/** Measures tokens per second from the arrival of the first tokens, without the prompt's time. */
export class Speedometer {
  constructor() {
    this.count = 0;
    this.countAtFirst = 0;
    this.first = null;
    this.last = null;
  }

  /** Add tokens that arrived together; milliseconds: when. */
  add(count, milliseconds) {
    this.count += count;
    this.last = milliseconds;
    if (this.first === null) {
      this.first = milliseconds;
      this.countAtFirst = count;
    }
  }

  /** Tokens per second, or null while there is nothing to measure. */
  get tokensPerSecond() {
    if (this.first === null || this.last <= this.first) return null;
    return (1000 * (this.count - this.countAtFirst)) / (this.last - this.first);
  }
}

/**
 * Return where two texts diverge, or null if they do not (so far).
 *
 * The result has the index of the token in each text with the first different character, which is
 * the number of its tokens if the text ends there, and the number of equal characters.
 */
export function findDivergence(left, right, areComplete) {
  const [a, b] = [left.join(""), right.join("")];
  const shorter = Math.min(a.length, b.length);
  let characters = 0;
  while (characters < shorter && a[characters] === b[characters]) characters += 1;
  if (characters === shorter && (!areComplete || a.length === b.length)) return null;
  return { left: tokenAt(left, characters), right: tokenAt(right, characters), characters };
}

function tokenAt(texts, position) {
  let end = 0;
  const index = texts.findIndex((text) => (end += text.length) > position);
  return index < 0 ? texts.length : index;
}
