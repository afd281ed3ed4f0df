// Browsers refuse a Worker to a page from a disk, and the search is one: its script runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      const inside = this.frame.contentWindow, script = inside.document.createElement("script");
      inside.postMessage = (data) => this.deliver(this, data);
      this.ready = new Promise((ready) => { script.onload = () => ready(inside); });
      script.src = url;
      inside.document.body.append(script);
    }
    postMessage(data) {
      this.ready.then((inside) => this.deliver(inside, data));
    }
    deliver(to, message) {  // later, and a copy: so do workers
      const data = structuredClone(message);
      setTimeout(() => to.onmessage?.({ data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
