/* The page: the conversation is here; the server keeps pictures and answers questions (web/page.py). */

import { copyAsWritten } from "./formulas.js"
import { Files, keep, recall } from "./store.js"
import { $, announce, button, copy, editor, figure, fill, grow, label, make, notice, setting, t, translate } from "./view.js"

const SETTINGS = [
  { name: "num_beams", type: "range", min: 1, max: 10, step: 1, value: 1 },
  { name: "temperature", type: "range", min: 0.1, max: 2, step: 0.1, value: 1 },
  { name: "do_sample", type: "checkbox", value: true },
  { name: "top_p", type: "range", min: 0.05, max: 1, step: 0.05, value: 0.9 },
  { name: "max_new_tokens", type: "range", min: 1, max: 1000, step: 1, value: 300 },
  { name: "min_length", type: "range", min: 1, max: 1000, step: 1, value: 1 },
  { name: "repetition_penalty", type: "range", min: 1, max: 2, step: 0.05, value: 1 },
  { name: "length_penalty", type: "range", min: -2, max: 2, step: 0.1, value: 1 },
  { name: "seed", type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, value: null },
  { name: "frames", type: "range", min: 1, max: 16, step: 1, value: 8 },
]
const MAIN_SETTINGS = 2 // those before "More settings"
const MOST_SECONDS = 15 // between two requests to a server that cannot be reached
const TRIES = 20 // of an upload that finds the server busy
const NEAR = 80 // pixels from the end of the conversation within which it follows the answer

const config = await (await fetch("config.json")).json()
translate(config.texts, [new URLSearchParams(location.search).get("lang") ?? "", ...navigator.languages])

const tab = recall("tab", Math.random().toString(36).slice(2))
keep("tab", tab)
const database = new Files(tab)
const box = $("#box textarea")
const chatbot = $("#chatbot")

/* A message is {role: "user", text, files: [number]}, {role: "assistant", text, state, notes, vote}, or
 * {role: "failed", question, text, reason}, which the model does not see. A file: {name, video, id, pictures}. */
let messages = recall("messages", [])
let files = recall("files", {})
let settings = recall("settings", {})
let running = null // {controller, answer}
let editing = false
let ready = false
let leaving = false
let following = true
let lastTop = 0 // where the conversation was scrolled to
const blobs = {}
const uploading = new Map()

function save() {
  keep("messages", messages)
  keep("files", Object.fromEntries(Object.entries(files).map(([number, { url, ...file }]) => [number, file])))
  keep("settings", settings)
  keep("draft", box.value)
}

// Showing

function render() {
  const last = lastAnswer()
  $("#welcome").hidden = messages.length > 0
  $("#restart").hidden = $("#download").hidden = messages.length === 0
  $("#messages").replaceChildren(...messages.map((message) => row(message, last)))
  $("#send").hidden = running !== null
  $("#stop").hidden = running === null
  box.placeholder = t(Object.keys(files).length ? "type" : "no_picture_yet")
  save()
}

function row(message, last) {
  const item = make("li", { className: message.role })
  if (message.role === "user") {
    const isLast = messages.indexOf(message) === last - 1 && !running
    const pictures = make("div", { className: "pictures" })
    for (const number of message.files) {
      const asked = message.text || messages.indexOf(message) < last
      pictures.append(figure(files[number], asked ? null : () => removeFile(number)))
    }
    if (message.files.length) item.append(pictures)
    if (isLast && editing) {
      item.append(editor(message.text, edited, () => stopEditing()))
    } else if (message.text) {
      item.append(bubble("user", t("you"), message.text))
      if (isLast) item.append(make("div", { className: "actions" }, button(t("edit"), edit)))
    }
    return item
  }
  const isFailure = message.role === "failed"
  if (isFailure && message.question) item.append(bubble("user", t("you"), message.question))
  if (!isFailure || message.text) {
    const shown = bubble("bot", t("model"), "")
    fill(shown, isFailure ? { ...message, state: "done" } : message)
    item.append(shown)
  }
  item.append(isFailure ? failure(message) : actions(message, messages.indexOf(message) === last))
  return item
}

function bubble(who, name, text) {
  return make("div", { className: "bubble", dir: "auto", role: "group", "aria-label": name, "data-testid": who }, text)
}

function failure(message) {
  const again = button(t("try_again"), () => {
    if (box.value === message.question) box.value = ""
    ask(message.question)
  }, { className: "again" })
  return make("div", { className: "actions" }, make("span", { className: "problem" }, message.reason), again)
}

function actions(message, isLast) {
  const made = make("div", { className: "actions" })
  if (message.state !== "done") return made
  const copying = button(t("copy"), () => copy(message.text, copying))
  made.append(copying)
  if (isLast && !running) made.append(button(t("retry"), () => answerAgain(questionBefore(message).text)))
  if (config.feedback && isLast) {
    for (const [name, good] of [["good", true], ["bad", false]]) {
      const pressed = button($(`#${name}`).content.cloneNode(true), () => vote(message, good), { title: t(name) })
      pressed.setAttribute("aria-label", t(name))
      pressed.setAttribute("aria-pressed", message.vote === good)
      made.append(pressed)
    }
  }
  made.append(make("span", {}, (message.notes ?? []).map(([key, values]) => t(key, values)).join(" ")))
  return made
}

/** Show the end of the conversation, and stay there while it grows, until the visitor scrolls up. */
function toEnd() {
  following = true
  chatbot.scrollTop = chatbot.scrollHeight
  lastTop = chatbot.scrollTop
}

function connectScrolling() {
  chatbot.onscroll = () => {
    // The event comes late: a picture may have been loaded since, and the end be far away, without anybody scrolling.
    const isNear = chatbot.scrollHeight - chatbot.scrollTop - chatbot.clientHeight < NEAR
    if (isNear || chatbot.scrollTop < lastTop) following = isNear
    lastTop = chatbot.scrollTop
  }
  const follow = new ResizeObserver(() => following && messages.length && toEnd())
  follow.observe($("#messages"))
  follow.observe(chatbot)
}

function lastAnswer() {
  return messages.findLastIndex((message) => message.role === "assistant")
}

function questionBefore(answer) {
  return messages[messages.indexOf(answer) - 1]
}

// Pictures

/** Show files to the model. They join the conversation at once; the model sees them with the next question. */
async function addFiles(list) {
  const chosen = [...list]
  if (!chosen.length) return
  if (!ready) return notice(t("loading"))
  notice()
  let message = messages.at(-1)
  if (message?.role !== "user" || message.text) {
    message = { role: "user", text: "", files: [] }
    messages.push(message)
  }
  await Promise.all(
    chosen.map((file) => {
      const number = 1 + Math.max(0, ...Object.keys(files).map(Number))
      files[number] = { name: file.name || "picture", video: isVideo(file), url: URL.createObjectURL(file) }
      blobs[number] = file
      database.put(number, file)
      message.files.push(number)
      const upload = send(number)
        .then(() => true)
        .catch((error) => lose(number, error))
      uploading.set(number, upload)
      return upload.finally(() => uploading.delete(number)).then(render)
    }).concat(started()),
  )
}

function isVideo(file) {
  return file.type.startsWith("video/") || /\.(mp4|m4v|mov|webm|mkv|avi)$/i.test(file.name)
}

function started() {
  render()
  toEnd()
  box.focus()
}

/** Upload a file, and note the name that the server gives it. Throws an Error whose message the visitor can read. */
async function send(number, tries = TRIES) {
  const { name } = files[number]
  const blob = blobs[number] ?? (await database.get(number))
  if (!blob) throw fault("gone", {}, 410)
  if (blob.size > config.max_upload_mb * 2 ** 20) throw fault("large_file", { name, megabytes: config.max_upload_mb }, 413)
  const query = new URLSearchParams({ name, frames: settings.frames ?? 8 })
  const response = await post(`pictures?${query}`, blob)
  const isBusy = response.status === 429 && !response.headers.has("Retry-After") // which too many guesses get
  if (isBusy && tries > 1) {
    await new Promise((resolve) => setTimeout(resolve, 500 + 1000 * Math.random()))
    return send(number, tries - 1)
  }
  if (!response.ok) throw await problem(response)
  const { id, pictures } = await response.json()
  if (files[number]) Object.assign(files[number], { id, pictures })
  else post("forget", [id]).catch(() => {}) // it was taken away meanwhile
}

function post(path, body, options = {}) {
  const isJson = !(body instanceof Blob)
  const type = isJson ? "application/json" : "application/octet-stream"
  const request = { method: "POST", headers: { "Content-Type": type }, body: isJson ? JSON.stringify(body) : body }
  return fetch(path, { ...request, ...options }).catch((error) => {
    throw error.name === "AbortError" ? error : fault("broken")
  })
}

/** An error that the visitor reads as the text of a key of texts.json. status: of the response; 0: there was none. */
function fault(key, values = {}, status = 0) {
  return Object.assign(new Error(t(key, values)), { values, status })
}

/** The error of a response. The checks before the page, and proxies, have no key for it. */
async function problem(response) {
  const { error, values } = await response.json().catch(() => ({}))
  const { status } = response
  if (typeof error === "string") return fault(error, values, status)
  return fault([502, 503, 504].includes(status) ? "broken" : "refused", { status }, status)
}

function removeFile(number) {
  if (files[number]?.id) post("forget", [files[number].id]).catch(() => {})
  delete files[number]
  messages = withoutRemoved(messages)
  render()
}

function withoutRemoved(list) {
  for (const message of list) message.files = message.files?.filter((number) => number in files)
  return list.filter((message) => message.role !== "user" || message.text || message.files.length)
}

/** Remove a file that cannot be uploaded, and say why. */
function lose(number, error) {
  removeFile(number)
  notice(error.message, "problem")
  return false
}

// Questions

/** Ask what is in the box, an example's question, or a question that failed before. */
async function ask(text) {
  if (running) return notice(t("wait"))
  if (!text.trim()) return notice(t("ask_something"))
  const uploaded = await Promise.all(uploading.values())
  if (running || uploaded.includes(false)) return
  if (!Object.keys(files).length) return notice(t(ready ? "no_picture" : "loading"))
  const before = structuredClone(messages)
  messages = messages.filter((message) => message.role !== "failed")
  let question = messages.at(-1)
  if (question?.role !== "user" || question.text) {
    question = { role: "user", text: "", files: [] }
    messages.push(question)
  }
  question.text = text
  if (box.value === text) box.value = ""
  await answer(before)
}

/** Ask the last question again, with this text. */
async function answerAgain(text) {
  if (running) return notice(t("wait"))
  if (!text.trim()) return notice(t("ask_something"))
  const before = structuredClone(messages)
  const last = lastAnswer()
  const later = messages.slice(last + 1).filter((message) => message.role === "user")
  messages = messages.slice(0, last)
  messages.at(-1).text = text
  await answer(before, later)
}

function edit() {
  editing = true
  render()
  const area = $(".edit textarea")
  grow(area)
  area.focus()
}

function stopEditing() {
  editing = false
  render()
  box.focus()
}

function edited(text) {
  editing = false
  return answerAgain(text)
}

/** Answer the last question. If this fails, `before` is shown again, and the question returns to the box.
 *  later: messages with pictures that follow the answer. */
async function answer(before, later = []) {
  const asked = [...messages]
  const reply = { role: "assistant", text: "", state: "waiting" }
  const question = asked.at(-1).text
  messages.push(reply, ...later)
  running = { controller: new AbortController(), reply }
  editing = false
  notice()
  started()
  const end = await read(asked, reply).catch((error) => error)
  if (leaving) return // `restore` goes on from what was saved
  running = null
  reply.state = "done"
  const stopped = end.name === "AbortError"
  if (stopped && reply.text) reply.notes = [["stopped"]]
  else if (end instanceof Error) takeBack(before, reply, question, stopped, end)
  else reply.notes = [...end.notes.map((key) => [key]), ["speed", speed(end)]]
  render()
  announce(reply.text || $("#notice").textContent)
  if (document.activeElement === document.body) box.focus()
}

function speed({ tokens, seconds }) {
  return { tokens, speed: (tokens / Math.max(seconds, 0.001)).toFixed(1) }
}

function takeBack(before, reply, question, stopped, error) {
  const added = messages.slice(messages.indexOf(reply) + 1).filter((message) => message.role === "user")
  const known = new Set(before.flatMap((message) => message.files ?? []))
  messages = withoutRemoved([...before, ...added.filter((message) => message.files.some((number) => !known.has(number)))])
  messages = messages.filter((message) => message.role !== "failed")
  if (!box.value) box.value = question
  grow(box)
  const isOwnFault = error.status >= 400 && error.status < 500 && ![408, 429].includes(error.status)
  if (stopped) notice(t("left_line"))
  else if (isOwnFault) notice(error.message, "problem")
  else messages.push({ role: "failed", question, text: reply.text, reason: error.message })
  toEnd()
}

/** Ask the server about these messages, and write its answer into `reply`. Returns its last update. */
async function read(asked, reply, again = true) {
  const chosen = Object.fromEntries(Object.entries(settings).filter(([name, value]) => name !== "frames" && value !== null))
  if (chosen.min_length > (chosen.max_new_tokens ?? 300)) chosen.min_length = chosen.max_new_tokens ?? 300
  const body = {
    messages: asked
      .filter((message) => message.role !== "failed")
      .map(({ role, text, files: numbers }) => ({ role, text, pictures: (numbers ?? []).map((number) => files[number].id) })),
    settings: chosen,
  }
  const response = await post("answer", body, { signal: running.controller.signal })
  if (response.status === 410 && again) {
    const { values } = await problem(response)
    const gone = Object.keys(files).filter((number) => values.missing.includes(files[number].id))
    const sendAgain = (number) => send(number).catch((error) => {
      if (error.status === 410) removeFile(number) // the browser has lost it, too
      throw error
    })
    await Promise.all(gone.map(sendAgain))
    return read(asked, reply, false)
  }
  if (!response.ok) throw await problem(response)
  for await (const update of updates(response)) {
    if (update.error) throw fault(update.error, update.values, 500)
    if (update.end) return update
    follow(reply, update)
  }
  throw fault("broken")
}

async function* updates(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let received = ""
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : fault("broken")
    })
    if (done) return
    received += value
    const events = received.split("\n\n")
    received = events.pop()
    for (const event of events) yield JSON.parse(event.slice("data: ".length))
  }
}

function follow(reply, { add, text, line, seconds }) {
  Object.assign(reply, { line, seconds, text: text ?? reply.text + (add ?? "") })
  const bubbles = document.querySelectorAll("#messages > .assistant .bubble")
  fill(bubbles[bubbles.length - 1], reply)
}

async function vote(message, good) {
  message.vote = message.vote === good ? undefined : good
  render()
  if (message.vote === undefined) return
  const talk = messages.slice(0, messages.indexOf(message) + 1).filter(({ role }) => role !== "failed")
  await post("feedback", { good, messages: talk.map(({ role, text }) => ({ role, text })) }).catch(() => {})
}

// The whole conversation

function restart() {
  running?.controller.abort()
  const ids = Object.values(files).map((file) => file.id).filter(Boolean)
  if (ids.length) post("forget", ids).catch(() => {})
  database.clear()
  for (const { url } of Object.values(files)) if (url) URL.revokeObjectURL(url)
  messages = []
  files = {}
  box.value = ""
  editing = false
  notice()
  render()
  grow(box)
  $("#start").focus()
}

function download(name, type, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name })
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
  $("#download").open = false
}

const spoken = () => messages.filter((message) => message.role !== "failed")
const shownIn = (message) => (message.files ?? []).map((number) => files[number])

function asMarkdown() {
  const parts = spoken().map((message) => {
    const who = t(message.role === "user" ? "you" : "model")
    const pictures = shownIn(message).map(({ name, video, pictures: count }) => `*${t(video ? "frames_seen" : "picture", { name, count })}*`)
    return `**${who}**\n\n${[...pictures, message.text].filter(Boolean).join("\n\n")}\n`
  })
  return `# MiniGPT-4\n\n${parts.join("\n")}`
}

function asJson() {
  const talk = spoken().map((message) => ({ role: message.role, text: message.text, files: shownIn(message).map(({ name }) => name) }))
  return JSON.stringify({ messages: talk, settings }, null, 2) + "\n"
}

/** Show what a reload has left: pictures from the database, and an answer that it has cut off. */
async function restore() {
  box.value = recall("draft", "")
  for (const [number, file] of Object.entries(files)) {
    blobs[number] = await database.get(Number(number))
    if (blobs[number]) file.url = URL.createObjectURL(blobs[number])
    if (!file.id) send(number).catch((error) => lose(number, error)).then(render)
  }
  const cut = messages.find((message) => message.role === "assistant" && message.state !== "done")
  if (cut?.text) {
    Object.assign(cut, { state: "done", notes: [["broken"]] })
  } else if (cut) {
    const question = questionBefore(cut).text
    const at = messages.indexOf(cut)
    messages.splice(at, 1)
    if (messages[at - 1].files.length) messages[at - 1].text = ""
    else messages.splice(at - 1, 1)
    if (!box.value) box.value = question
    messages.push({ role: "failed", question, text: "", reason: t("broken") })
  }
  render()
  if (messages.length) toEnd()
}

// The frame of the page

function showSettings(open) {
  $("#settings").hidden = !open
  $("#open-settings").setAttribute("aria-expanded", open)
}

function buildSettings() {
  const rows = SETTINGS.map((each) => {
    const value = settings[each.name] ?? each.value
    return setting({ ...each, value }, (chosen) => {
      if (chosen === each.value) delete settings[each.name]
      else settings[each.name] = chosen
      save()
    })
  })
  $("#main-settings").replaceChildren(...rows.slice(0, MAIN_SETTINGS))
  $("#more-settings").replaceChildren(...rows.slice(MAIN_SETTINGS))
}

function buildExamples() {
  const asked = (index) => t(config.emoji ? `emoji_${1 + (index % 2)}` : `example_${index + 1}`)
  const items = config.examples.map((name, index) => {
    const question = asked(index)
    const use = async () => {
      const blob = await fetch(`examples/${name}`).then((response) => response.blob()).catch(() => null)
      if (!blob) return notice(t("broken"), "problem")
      await addFiles([new File([blob], name, { type: blob.type })])
      if (Object.keys(files).length) await ask(question)
    }
    return make("li", {}, button(make("img", { src: `examples/${name}`, alt: "" }), use, { disabled: !ready }))
  })
  items.forEach((item, index) => item.firstChild.append(asked(index)))
  $("#examples").replaceChildren(...items)
}

/** Wait until the model is loaded. A server that cannot be reached, or refuses, is asked less and less often. */
async function waitForModel() {
  for (let seconds = 1; ;) {
    const state = await fetch("progress").then((response) => response.json()).catch(() => null)
    const isLoading = typeof state?.ready === "boolean"
    const isRefused = typeof state?.error === "string"
    ready = isLoading && state.ready
    const reason = isRefused ? t(state.error, state.values) : t("unreachable")
    $("#status").textContent = ready ? "" : isLoading ? t("progress", state) : reason
    $("#start").disabled = !ready
    for (const each of document.querySelectorAll("#examples button")) each.disabled = !ready
    if (ready) return
    if (isLoading) seconds = 1
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000))
    if (!isLoading) seconds = Math.min(2 * seconds, MOST_SECONDS)
  }
}

function connect() {
  $("#start").onclick = $("#attach").onclick = () => $("#files").click()
  $("#files").onchange = (event) => {
    addFiles(event.target.files)
    event.target.value = ""
  }
  $("#box").onsubmit = (event) => {
    event.preventDefault()
    ask(box.value).then(() => grow(box))
    grow(box)
  }
  $("#stop").onclick = () => running?.controller.abort()
  $("#restart").onclick = restart
  $("#markdown").onclick = () => download("minigpt4.md", "text/markdown", asMarkdown())
  $("#json").onclick = () => download("minigpt4.json", "application/json", asJson())
  $("#open-settings").onclick = () => showSettings($("#settings").hidden)
  $("#defaults").onclick = () => {
    settings = {}
    buildSettings()
    save()
  }
  $("#dark").onclick = () => theme(isDark() ? "light" : "dark")
  $("#viewer").onclick = () => $("#viewer").close()
  box.oninput = () => {
    grow(box)
    keep("draft", box.value)
  }
  box.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return
    event.preventDefault()
    $("#box").requestSubmit()
  }
  addEventListener("pagehide", () => {
    save()
    leaving = true
  })
  addEventListener("pageshow", () => (leaving = false))
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && editing) stopEditing()
    if (event.key === "Escape") $("#download").open = false
  })
  addEventListener("click", (event) => {
    if (!$("#download").contains(event.target)) $("#download").open = false
  })
  connectScrolling()
  connectDrops()
}

function connectDrops() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files")
  addEventListener("copy", copyAsWritten)
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return
    event.preventDefault()
    $("#dropping").hidden = false
  })
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("#dropping").hidden = true
  })
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return
    event.preventDefault()
    $("#dropping").hidden = true
    addFiles(event.dataTransfer.files)
  })
  addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return
    event.preventDefault()
    addFiles(event.clipboardData.files)
  })
}

const isDark = () => document.documentElement.classList.contains("dark") ||
  (!document.documentElement.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches)

function theme(name) {
  document.documentElement.className = name
  localStorage.setItem("theme", name)
}

document.documentElement.className = localStorage.getItem("theme") ?? ""
$("#about").textContent = t(config.emoji ? "about_emoji" : "about")
$("#limits").textContent = t("limits", { megabytes: config.max_upload_mb })
buildSettings()
buildExamples()
showSettings(matchMedia("(min-width: 1100px)").matches)
connect()
await restore()
grow(box)
await waitForModel()
