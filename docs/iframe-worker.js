/* Search runs in a worker, which browsers do not start for pages opened from disk. There
this class runs it in a hidden frame and sends it the same messages. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.loaded = new Promise((done) => frame.addEventListener("load", done));
      addEventListener("message", ({ source, data }) => {
        if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
      });
      const page = this.inside.document;
      page.open();
      page.write('<script>postMessage = (data) => parent.postMessage(data, "*")</script>');
      page.write(`<script src="${url}"></script>`);
      page.close();
    }

    async postMessage(data) {
      await this.loaded;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
