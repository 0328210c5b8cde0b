/* Markdown as elements. Texts become text nodes only, so a model's answer has no markup of its own, and nothing in it
 * is fetched: links and pictures stay texts. */

import { formula } from "./formulas.js"

/** The blocks of a text, as elements. copyButton(text) makes a button that copies a block of code. */
export function blocks(text, copyButton) {
  const lines = text.replaceAll("\r\n", "\n").split("\n")
  const found = []
  let at = 0
  const take = (test) => {
    const taken = []
    while (at < lines.length && test(lines[at])) taken.push(lines[at++])
    return taken
  }
  while (at < lines.length) {
    const line = lines[at]
    let match
    if (!line.trim()) {
      at++
    } else if ((match = line.match(/^\s{0,3}(`{3,}|~{3,})\s*([^`]*)$/))) {
      at++
      const closes = (other) => other.trim().startsWith(match[1]) && !other.trim().replaceAll(match[1][0], "")
      const code = take((other) => !closes(other)).join("\n")
      at++
      found.push(codeBlock(code, match[2].trim(), copyButton))
    } else if ((match = line.match(/^(#{1,6})\s+(.*?)\s*#*$/))) {
      at++
      found.push(element(`h${Math.min(match[1].length + 2, 5)}`, ...inline(match[2])))
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      at++
      found.push(element("hr"))
    } else if (/^\s{0,3}>/.test(line)) {
      const quoted = take((other) => /^\s{0,3}>/.test(other)).map((other) => other.replace(/^\s*> ?/, ""))
      found.push(element("blockquote", ...blocks(quoted.join("\n"), copyButton)))
    } else if (line.includes("|") && isRule(lines[at + 1])) {
      found.push(table(take((other) => other.includes("|"))))
    } else if ((match = line.match(ITEM))) {
      found.push(list(take(inList(line)), copyButton))
    } else {
      const paragraph = [lines[at++]]
      paragraph.push(...take((other) => other.trim() && !BLOCK.test(other)))
      found.push(element("p", ...inline(paragraph.join("\n"))))
    }
  }
  return found
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/
const BLOCK = /^\s{0,3}(`{3}|~{3}|#{1,6}\s|>|[-*+]\s|\d{1,9}[.)]\s)/

function element(name, ...children) {
  const made = document.createElement(name)
  made.append(...children)
  return made
}

function codeBlock(code, language, copyButton) {
  const head = element("div", element("span", language), copyButton(code))
  const pre = element("pre", element("code", code))
  pre.tabIndex = 0
  const block = element("div", head, pre)
  block.className = "code"
  return block
}

/** Whether a line goes on with the list that `first` begins. */
function inList(first) {
  const [, indent, marker] = first.match(ITEM)
  const ordered = /\d/.test(marker)
  return (line) => {
    const match = line.match(ITEM)
    if (match && match[1].length <= indent.length) return /\d/.test(match[2]) === ordered
    return Boolean(match) || (/^\s+\S/.test(line) && line.search(/\S/) > indent.length)
  }
}

function list(lines, copyButton) {
  const [, indent, marker] = lines[0].match(ITEM)
  const made = element(/\d/.test(marker) ? "ol" : "ul")
  if (/\d/.test(marker)) made.start = parseInt(marker)
  let item = []
  const finish = () => {
    if (item.length) made.append(element("li", ...unwrap(blocks(item.join("\n"), copyButton))))
    item = []
  }
  for (const line of lines) {
    const match = line.match(ITEM)
    if (match && match[1].length <= indent.length) {
      finish()
      item.push(line.slice(match[0].length))
    } else {
      item.push(line.slice(Math.min(line.search(/\S/), indent.length + 2)))
    }
  }
  finish()
  return made
}

/** The text of an item's only paragraph, without the paragraph. */
function unwrap(children) {
  return children[0]?.tagName === "P" ? [...children[0].childNodes, ...children.slice(1)] : children
}

function cells(line) {
  const parts = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  return parts.map((part) => part.trim().replaceAll("\\|", "|"))
}

function isRule(line) {
  return line !== undefined && line.includes("-") && cells(line).every((cell) => /^:?-+:?$/.test(cell))
}

function table(lines) {
  const row = (line, name) => element("tr", ...cells(line).map((cell) => element(name, ...inline(cell))))
  const made = element("table")
  made.append(element("thead", row(lines[0], "th")), element("tbody", ...lines.slice(2).map((line) => row(line, "td"))))
  const around = element("div", made)
  around.className = "table"
  around.tabIndex = 0
  return around
}

const INLINE = new RegExp(
  [
    /(?<code>(?<ticks>`+)(?<inside>[^`]|[^`][\s\S]*?[^`])\k<ticks>(?!`))/,
    // Formulas, whose stars and underscores are no emphasis. `$` is also money, and `$$` a class of prices.
    /(?<block>\$\$(?<tex1>[^$]+)\$\$|\\\[(?<tex2>[\s\S]+?)\\\])/,
    /(?<math>(?<![\w$\\])\$(?=\S)(?<tex3>[^$\n]*?[^\s$\\])\$(?![\d$])|\\\((?<tex4>[\s\S]+?)\\\))/,
    /(?<escaped>\\[!-/:-@[-`{-~])/,
    /(?<strong>\*\*(?=\S)(?<bold>[\s\S]*?\S)\*\*|__(?=\S)(?<bold2>[\s\S]*?\S)__(?!\w))/,
    /(?<em>\*(?=[^\s*])(?<slanted>[^*\n]*?[^\s*])\*|(?<!\w)_(?=[^\s_])(?<slanted2>[^_\n]*?[^\s_])_(?!\w))/,
    /(?<del>~~(?=\S)(?<gone>[\s\S]*?\S)~~)/,
  ].map((part) => part.source).join("|"),
  "g",
)

/** A line's text and emphasis, as nodes. */
function inline(text) {
  const nodes = []
  let at = 0
  for (const match of text.matchAll(INLINE)) {
    const found = match.groups
    nodes.push(text.slice(at, match.index))
    at = match.index + match[0].length
    if (found.code) nodes.push(element("code", found.inside.replace(/^ (.*\S.*) $/s, "$1")))
    else if (found.block || found.math) nodes.push(math(match[0], found))
    else if (found.escaped) nodes.push(found.escaped.slice(1))
    else if (found.strong) nodes.push(element("strong", ...inline(found.bold ?? found.bold2)))
    else if (found.em) nodes.push(element("em", ...inline(found.slanted ?? found.slanted2)))
    else nodes.push(element("del", ...inline(found.gone)))
  }
  nodes.push(text.slice(at))
  return nodes.filter((node) => node !== "")
}

/** A formula, or its text if nothing in it is a sign of one. */
function math(written, { block, tex1, tex2, tex3, tex4 }) {
  const tex = (tex1 ?? tex2 ?? tex3 ?? tex4).trim()
  return /[\\^_={}<>+]|^[a-zA-Z]$/.test(tex) ? formula(written, tex, Boolean(block)) : written
}
