// Browsers refuse a Worker to a page from a disk, and the search is one: its script runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      const inside = this.frame.contentWindow, script = inside.document.createElement("script");
      inside.postMessage = (data) => this.onmessage?.({ data });
      this.ready = new Promise((ready) => { script.onload = () => ready(inside); });
      script.src = url;
      inside.document.body.append(script);
    }
    postMessage(data) {
      this.ready.then((inside) => inside.onmessage({ data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
