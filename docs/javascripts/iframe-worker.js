// Browsers start no worker for a page that was opened from a folder on disk. There, the search program runs in a hidden
// frame instead, which hears and sends messages as a worker does.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc =
        "<!doctype html><script>" +
        "window.postMessage = (data) => parent.postMessage(data, '*');" +
        // The program waits for `importScripts`, which cannot wait itself in a frame.
        "window.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, fail) => {" +
        "const script = document.createElement('script');" +
        "Object.assign(script, {src: url, onload: done, onerror: fail});" +
        "document.head.appendChild(script); })), Promise.resolve());" +
        "</" + 'script><script src="' + new URL(url, location.href).href + '"></' + "script>";
      window.addEventListener("message", (event) => {
        if (event.source === this.frame.contentWindow) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        }
      });
      this.frame.onload = () => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      };
      document.documentElement.appendChild(this.frame);
    }

    postMessage(data) {
      if (this.ready) {
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      } else {
        this.waiting.push(data);
      }
    }

    terminate() {
      this.frame.remove();
    }
  };
}
