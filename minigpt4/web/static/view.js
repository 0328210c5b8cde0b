/* How a conversation looks: messages, pictures, notices. */

import { blocks } from "./markdown.js"

let texts = {}
let fallback = {}

export const $ = (selector) => document.querySelector(selector)

/** The text of a key of texts.json, with values in it. */
export function t(key, values = {}) {
  const text = texts[key] ?? fallback[key] ?? key
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name]?.toLocaleString(document.documentElement.lang) ?? whole)
}

/** Choose the first of the visitor's languages that there are texts for, and write the texts of the page. */
export function translate(tables, languages) {
  const known = languages.map((language) => language.split("-")[0]).find((language) => tables[language]) ?? "en"
  texts = tables[known]
  fallback = tables.en
  document.documentElement.lang = known === "zh" ? "zh-CN" : known
  for (const each of document.querySelectorAll("[data-text]")) each.textContent = t(each.dataset.text)
  for (const each of document.querySelectorAll("[data-label]")) label(each, t(each.dataset.label))
}

export function label(element, text) {
  element.setAttribute("aria-label", text)
  if (["BUTTON", "SUMMARY"].includes(element.tagName)) element.title = text
}

export function make(name, properties = {}, ...children) {
  const { className, ...others } = properties
  const made = document.createElement(name)
  if (className) made.className = className
  for (const [key, value] of Object.entries(others)) {
    if (key in made) made[key] = value
    else made.setAttribute(key, value)
  }
  made.append(...children.filter((child) => child !== null && child !== undefined))
  return made
}

export function button(text, onclick, properties = {}) {
  return make("button", { type: "button", onclick, ...properties }, text)
}

/** Say something above the box; className: "problem" for what went wrong. */
export function notice(text = "", className = "") {
  Object.assign($("#notice"), { textContent: text, className })
}

export function announce(text) {
  $("#announcer").textContent = text
}

/** Put a text into the clipboard, exactly; also on pages without TLS, where browsers have no clipboard API. */
export async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text)
  } catch {
    const area = make("textarea", { value: text, className: "unseen" })
    document.body.append(area)
    area.select()
    document.execCommand("copy")
    area.remove()
  }
  const before = pressed.textContent
  pressed.textContent = t("copied")
  setTimeout(() => (pressed.textContent = before), 1500)
}

function copyCode(code) {
  const made = button(t("copy"), () => copy(code, made), { className: "quiet" })
  made.setAttribute("aria-label", t("copy_code"))
  return made
}

/** Show an answer's text in its bubble. */
export function fill(bubble, message) {
  bubble.classList.toggle("waiting", !message.text && message.state !== "done")
  if (message.text) {
    const shown = blocks(message.text, copyCode)
    for (const each of shown) each.dir = "auto" // a part with `dir` of its own would not count for its list or quotation
    bubble.replaceChildren(...shown)
  }
  else bubble.replaceChildren(message.state === "done" ? "…" : waiting(message))
}

function waiting({ line, seconds }) {
  if (!line) return t("thinking")
  const key = (line > 1 ? "line" : "line_first") + (seconds ? "_seconds" : "")
  return t(key, { line, seconds })
}

/** A picture or video of a message. remove: called if the visitor takes it away again; null: it has been asked about. */
export function figure(file, remove) {
  const { name, id, pictures, url, video } = file
  const made = make("figure")
  if (!id) {
    made.append(make("div", { className: "reading" }, t("reading")))
  } else if (video) {
    const player = make("video", { src: url ?? "", controls: true, preload: "metadata" })
    player.setAttribute("aria-label", name)
    player.onerror = () => player.remove() // a format that this browser does not play
    const frames = make("div", { className: "frames" })
    for (let number = 0; number < pictures; number++) {
      const values = { name, number: number + 1, count: pictures }
      frames.append(picture(`pictures/${id}/${number}`, t("frame", values)))
    }
    made.append(...(url ? [player] : []), frames)
    made.append(make("figcaption", {}, t("frames_seen", { name, count: pictures })))
  } else {
    const served = `pictures/${id}/0`
    const image = picture(url ?? served, t("picture", { name }))
    let triedServed = !url
    image.onerror = () => {
      if (triedServed) image.className = "gone"
      else image.src = served // a format that this browser does not show
      triedServed = true
    }
    made.append(button(image, () => enlarge(image), { className: "show", "aria-label": t("enlarge", { name }) }))
  }
  if (remove) made.append(button("", remove, { className: "remove", "aria-label": t("remove", { name }) }))
  return made
}

const shown = {}

/** The picture at this address: always the same element, since a new one has no height until it is loaded. */
function picture(src, alt) {
  return (shown[src] ??= make("img", { src, alt }))
}

function enlarge(image) {
  const viewer = $("#viewer")
  viewer.querySelector("img")?.remove()
  viewer.append(make("img", { src: image.currentSrc || image.src, alt: image.alt }))
  viewer.showModal()
}

/** Make a text area on the page as high as its text, up to its max-height. */
export function grow(area) {
  area.style.height = "auto"
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`
}

/** The form in which the last question is edited. */
export function editor(text, save, cancel) {
  const area = make("textarea", { value: text, rows: 1, dir: "auto", "aria-label": t("edit") })
  area.oninput = () => grow(area)
  area.onkeydown = (event) => {
    if (event.isComposing) return
    if (event.key === "Escape") cancel()
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault()
      save(area.value)
    }
  }
  const buttons = make("div", {}, button(t("cancel"), cancel, { className: "quiet" }))
  buttons.append(button(t("save"), () => save(area.value), { className: "primary" }))
  return make("div", { className: "edit" }, area, buttons)
}

const HINTS = ["num_beams", "temperature", "do_sample", "length_penalty", "seed", "frames"]

/** The fields of a setting: a slider with a number, a number alone, or a box to tick. Calls changed(value). */
export function setting({ name, type, min, max, step, value }, changed) {
  const id = `setting-${name}`
  const row = make("div", { className: "setting" }, make("label", { htmlFor: id }, t(name)))
  if (type === "checkbox") {
    row.append(make("input", { type, id, checked: value, onchange: (event) => changed(event.target.checked) }))
  } else {
    const number = make("input", { type: "number", id, min, max, step, value: value ?? "", inputMode: "decimal" })
    row.append(number)
    const range = type === "range" ? make("input", { type, min, max, step, value, "aria-label": t(name) }) : null
    const update = (text) => {
      const given = text === "" ? null : Math.min(Math.max(step === 1 ? Math.round(text) : Number(text), min), max)
      const kept = given === null && range ? value : given
      number.value = kept ?? ""
      if (range) range.value = kept
      changed(kept)
    }
    number.onchange = () => update(number.value)
    if (range) {
      range.oninput = () => update(range.value)
      row.append(range)
    }
  }
  if (HINTS.includes(name)) row.append(make("span", { className: "hint" }, t(`${name}_hint`)))
  return row
}
