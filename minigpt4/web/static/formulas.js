/* Formulas of an answer. The server turns TeX into MathML, and only the elements and attributes below are taken of it. */

const NAMESPACE = "http://www.w3.org/1998/Math/MathML"
const ELEMENTS = new Set(
  ("math mrow mi mn mo ms mtext mspace msub msup msubsup munder mover munderover mmultiscripts mprescripts none mfrac " +
    "msqrt mroot mtable mtr mtd mstyle mpadded mphantom").split(" "),
)
const ATTRIBUTES = new Set(
  ("display mathvariant stretchy fence separator form accent accentunder displaystyle scriptlevel linethickness minsize " +
    "maxsize movablelimits largeop symmetric lspace rspace width height depth voffset columnalign").split(" "),
)
const known = new Map() // TeX -> its MathML, or null if it is no formula
const waiting = new Map() // TeX -> the elements that show it

/** An element that shows a formula: as it was written until, and unless, the server knows its MathML. */
export function formula(written, tex, isBlock) {
  const shown = document.createElement("span")
  shown.className = isBlock ? "formula block" : "formula"
  shown.textContent = written
  if (known.has(tex)) {
    typeset(shown, known.get(tex))
  } else {
    if (!waiting.size) queueMicrotask(ask)
    waiting.set(tex, [...(waiting.get(tex) ?? []), shown])
  }
  return shown
}

/** Copy a selection with formulas as they were written. */
export function copyAsWritten(event) {
  const selection = getSelection()
  const part = selection.rangeCount ? selection.getRangeAt(0).cloneContents() : null
  if (!part?.querySelector("math")) return
  for (const math of part.querySelectorAll("math")) math.replaceWith(math.getAttribute("alttext"))
  const area = document.createElement("div")
  area.className = "unseen"
  area.append(part)
  document.body.append(area)
  event.clipboardData.setData("text/plain", area.innerText)
  area.remove()
  event.preventDefault()
}

async function ask() {
  const asked = [...waiting]
  waiting.clear()
  if (!asked.length) return
  const request = { method: "POST", headers: { "Content-Type": "application/json" } }
  try {
    const response = await fetch("formulas", { ...request, body: JSON.stringify(asked.map(([tex]) => tex)) })
    const found = response.ok ? await response.json() : []
    asked.forEach(([tex, elements], number) => {
      if (!(number in found)) return
      known.set(tex, found[number])
      for (const shown of elements) typeset(shown, found[number])
    })
    const rest = found.length ? asked.slice(found.length) : [] // the server reads so many at a time
    for (const [tex, elements] of rest) waiting.set(tex, [...elements, ...(waiting.get(tex) ?? [])])
    if (rest.length) await ask()
  } catch {
    // They stay as they were written, and are asked about again when the answer is shown again.
  }
}

function typeset(shown, mathml) {
  if (!mathml) return
  const made = copied(new DOMParser().parseFromString(mathml, "text/xml").documentElement)
  if (!made) return
  made.setAttribute("display", shown.classList.contains("block") ? "block" : "inline")
  made.setAttribute("alttext", shown.textContent)
  shown.replaceChildren(made)
}

/** A copy of an element with what is allowed; null: it is not. */
function copied(element) {
  if (element.namespaceURI !== NAMESPACE || !ELEMENTS.has(element.localName)) return null
  const made = document.createElementNS(NAMESPACE, element.localName)
  for (const { name, value } of element.attributes) if (ATTRIBUTES.has(name)) made.setAttribute(name, value)
  for (const child of element.childNodes) {
    const kept = child.nodeType === Node.ELEMENT_NODE ? copied(child) : child.textContent
    if (kept !== null) made.append(kept)
  }
  return made
}
