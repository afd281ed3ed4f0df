// A safe part of Markdown as nodes: code, lists, emphasis, headings, quotations, tables. No HTML, no links, no images: what
// is not one of these stays the text that it was.

const LIST = /^( {0,12})([-*+]|\d{1,9}[.)])(?: +|$)/;
const cells = line => line.trim().replace(/^\||\|$/g, "").split("|").map(cell => cell.trim());
const isRule = line => /^[\s|:-]+$/.test(line) && line.includes("|") && cells(line).every(cell => /^:?-+:?$/.test(cell));

function markdown(text) {
  const root = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), root, 0);
  return root;
}

function blocks(lines, into, depth) {
  let paragraph = [];
  const flush = () => {
    if (paragraph.length) into.append(inline(make("p"), paragraph.join("\n")));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i], fence = line.match(/^ {0,3}(`{3,}|~{3,})[^`]*$/);
    const heading = line.match(/^ {0,3}(#{1,6}) +(.*?)(?: +#+)? *$/);
    if (fence) {
      flush();
      const code = [], ends = text => text.startsWith(fence[1]) && !text.replaceAll(fence[1][0], "");
      while (++i < lines.length && !ends(lines[i].trim())) code.push(lines[i]);
      into.append(group("Code", make("pre", { tabIndex: 0 }, worded("code", code.join("\n")))));
    } else if (!line.trim()) {
      flush();
    } else if (heading) {
      flush();
      into.append(inline(make(heading[1].length < 3 ? "h3" : "h4"), heading[2]));
    } else if (/^ {0,3}([-*_])(?: *\1){2,} *$/.test(line)) {
      flush();
      into.append(make("hr"));
    } else if (/^ {0,3}> ?/.test(line) && depth < 5) {
      flush();
      const quoted = [];
      for (; i < lines.length && /^ {0,3}>/.test(lines[i]); i++) quoted.push(lines[i].replace(/^ {0,3}> ?/, ""));
      i--;
      const quote = make("blockquote");
      blocks(quoted, quote, depth + 1);
      into.append(quote);
    } else if (line.includes("|") && isRule(lines[i + 1] ?? "") && cells(lines[i + 1]).length === cells(line).length) {
      flush();
      const heads = cells(line), rows = [];
      for (i += 2; i < lines.length && lines[i].includes("|") && lines[i].trim(); i++) rows.push(cells(lines[i]));
      i--;
      const cell = (tag, words) => inline(make(tag), words ?? ""), width = Math.max(...[heads, ...rows].map(row => row.length));
      const across = Array.from({ length: width }, (_, k) => k);  // a row with more cells than the head keeps them
      into.append(group("Table", make("div", { className: "scroll", tabIndex: 0 }, make("table", {},
        make("thead", {}, make("tr", {}, ...across.map(k => cell("th", heads[k])))),
        make("tbody", {}, ...rows.map(row => make("tr", {}, ...across.map(k => cell("td", row[k])))))),
      )));
    } else if (LIST.test(line) && depth < 5) {
      flush();
      i = listing(lines, i, into, depth) - 1;
    } else {
      paragraph.push(line);
    }
  }
  flush();
}

function listing(lines, at, into, depth) {  // one list, its items' own lines with it; -> the line behind it
  const kind = line => /^ *\d/.test(line), ordered = kind(lines[at]);
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(lines[at], 10);
  while (at < lines.length && LIST.test(lines[at]) && kind(lines[at]) === ordered) {
    const width = lines[at].match(LIST)[0].length, own = [lines[at].slice(width)];
    const indent = lines[at].match(LIST)[1].length;
    for (at++; at < lines.length; at++) {
      const deep = lines[at].match(/^ */)[0].length;
      if (!lines[at].trim()) {  // a blank line stays inside if what follows is indented
        const next = lines.slice(at + 1, at + 3).find(line => line.trim());
        if (next === undefined || next.match(/^ */)[0].length <= indent) break;
        own.push("");
      } else if (deep > indent) {
        own.push(lines[at].slice(Math.min(deep, width)));
      } else {
        break;
      }
    }
    const item = make("li");
    blocks(own, item, depth + 1);
    if (item.childNodes.length === 1 && item.firstChild.tagName === "P") item.replaceChildren(...item.firstChild.childNodes);
    node.append(item);
    const after = lines[at + 1] ?? "";
    if (at < lines.length && !lines[at].trim() && LIST.test(after) && kind(after) === ordered) at++;  // a loose list
  }
  into.append(node);
  return at;
}

// Code, strong and emphasised words; what opens and is not closed is text.
const MARKS = /`+|\*{1,3}|(?<![\p{L}\p{N}])_{1,3}|_{1,3}(?![\p{L}\p{N}])|\\[\\`*_{}[\]()#+\-.!|>~]/gu;

function inline(into, text) {
  const parts = [];  // texts, nodes and marks, in order
  let from = 0;
  const ends = new Map();  // where runs of so many backticks begin, in order
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!ends.has(run.length)) ends.set(run.length, { places: [], next: 0 });
    ends.get(run.length).places.push(index);
  }
  for (const { 0: mark, index } of text.matchAll(MARKS)) {
    if (index < from) continue;  // inside of code
    if (mark[0] === "`") {
      const run = ends.get(mark.length) ?? { places: [], next: 0 };  // none: one of them was escaped
      while (run.places[run.next] <= index) run.next++;
      const end = run.places[run.next];
      if (end === undefined) continue;
      const code = text.slice(index + mark.length, end).replace(/^ (.+) $/s, "$1");
      parts.push(text.slice(from, index), make("code", { textContent: code }));
      from = end + mark.length;
    } else if (mark[0] === "\\") {
      parts.push(text.slice(from, index) + mark[1]);
      from = index + 2;
    } else {
      const before = text[index - 1] ?? " ", after = text[index + mark.length] ?? " ";
      if (/\s/.test(before) && /\s/.test(after)) continue;
      parts.push(text.slice(from, index), { mark, opens: !/\s/.test(after), closes: !/\s/.test(before) });
      from = index + mark.length;
    }
  }
  parts.push(text.slice(from));

  const stack = [{ node: document.createDocumentFragment(), mark: null }], open = new Map();
  for (const part of parts) {
    const top = stack[stack.length - 1];
    if (typeof part === "string" || part instanceof Node) {
      top.node.append(part);
    } else if (part.closes && open.get(part.mark) > 0) {
      let level;
      do {
        level = stack.pop();
        open.set(level.mark, open.get(level.mark) - 1);
        const outer = stack[stack.length - 1].node;
        if (level.mark === part.mark) outer.append(emphasised(level));
        else { outer.append(level.mark); outer.append(...level.node.childNodes); }
      } while (level.mark !== part.mark);
    } else if (part.opens && stack.length < 12) {
      stack.push({ node: document.createDocumentFragment(), mark: part.mark });
      open.set(part.mark, (open.get(part.mark) ?? 0) + 1);
    } else {
      top.node.append(part.mark);
    }
  }
  while (stack.length > 1) {
    const { node, mark } = stack.pop();
    stack[stack.length - 1].node.append(mark, ...node.childNodes);
  }
  into.append(stack[0].node);
  return into;
}

function emphasised({ node, mark }) {
  if (mark.length === 3) return make("em", {}, make("strong", {}, node));
  return make(mark.length === 2 ? "strong" : "em", {}, node);
}
