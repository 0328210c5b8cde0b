/* What survives a reload of the page: the conversation in the tab's storage, and the files in the browser's database. */

const DAY = 24 * 3600 * 1000

/** A value that this tab keeps, or the default. */
export function recall(name, otherwise) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? otherwise
  } catch {
    return otherwise
  }
}

export function keep(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value))
  } catch {
    // The storage is full or forbidden. The conversation then ends with the tab.
  }
}

/** The files of a tab's conversation. Without a database they end with the tab. */
export class Files {
  constructor(tab) {
    this.tab = tab
    this.database = new Promise((resolve) => {
      const opening = indexedDB.open("minigpt4", 1)
      opening.onupgradeneeded = () => opening.result.createObjectStore("files")
      opening.onsuccess = () => resolve(opening.result)
      opening.onerror = () => resolve(null)
    }).catch(() => null)
    this.prune((key, value) => value.time < Date.now() - DAY)
  }

  async store(mode) {
    const database = await this.database
    return database?.transaction("files", mode).objectStore("files")
  }

  async put(number, blob) {
    const store = await this.store("readwrite")
    store?.put({ blob, time: Date.now() }, [this.tab, number])
  }

  async get(number) {
    const store = await this.store("readonly")
    if (!store) return undefined
    return new Promise((resolve) => {
      const request = store.get([this.tab, number])
      request.onsuccess = () => resolve(request.result?.blob)
      request.onerror = () => resolve(undefined)
    })
  }

  clear() {
    return this.prune(([tab]) => tab === this.tab)
  }

  async prune(isOver) {
    const store = await this.store("readwrite")
    if (!store) return
    const walk = store.openCursor()
    walk.onsuccess = () => {
      const cursor = walk.result
      if (!cursor) return
      if (isOver(cursor.key, cursor.value)) cursor.delete()
      cursor.continue()
    }
  }
}
