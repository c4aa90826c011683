// The box with the details of the token under the pointer or with the keyboard's focus.

const GAP = 8; // pixels to the token and to the edges of the window

export class Tip {
  constructor(element) {
    this.element = element;
    this.span = null;
  }

  /** Show details next to a token; decorate: gives the title the style of its exit. */
  show(span, title, details, decorate) {
    const [first, second] = this.element.children;
    first.textContent = title;
    second.textContent = details;
    decorate(first);
    this.span = span;
    const isFollowing = !this.element.hidden;
    this.element.hidden = false;
    if (!isFollowing) this.follow();
  }

  /** Hide the details, and return whether there were any. */
  hide() {
    const wasShown = !this.element.hidden;
    this.element.hidden = true;
    return wasShown;
  }

  /** Keep the box next to its token, which moves when the page scrolls or the text grows. */
  follow() {
    const box = this.span.getClientRects()[0];
    if (!box) this.hide();
    if (this.element.hidden) return;
    const { offsetWidth, offsetHeight, style } = this.element;
    const right = document.documentElement.clientWidth - offsetWidth - GAP;
    const above = box.top - offsetHeight - GAP;
    style.left = `${Math.max(GAP, Math.min(box.left, right))}px`;
    style.top = `${above < GAP ? box.bottom + GAP : above}px`;
    requestAnimationFrame(() => this.follow());
  }
}
