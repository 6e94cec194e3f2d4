// Use the JavaScript client of the integration guide, as run_till.py uses the Python client.
import { readdirSync, readFileSync, writeFileSync } from "node:fs";

const [url, options, purchases] = [process.argv[2], ...process.argv.slice(3).map((json) => JSON.parse(json))];
const { Till } = await import(`file://${process.cwd()}/till.mjs`);

/** Return an object that writes its properties to a file. */
function openStore(file, content = {}) {
  const write = () => writeFileSync(file, JSON.stringify(content));
  return new Proxy(content, {
    set: (target, name, value) => { target[name] = value; write(); return true; },
    deleteProperty: (target, name) => { delete target[name]; write(); return true; },
  });
}

function openTill(store) {
  const times = { patienceSeconds: options.patience, timeoutSeconds: options.timeout };
  return new Till(url, store, options.token ? { ...times, token: async () => options.token } : times);
}

async function resume() {
  const results = [];
  for (const file of readdirSync(".").filter((name) => name.endsWith(".json")).sort()) {
    const till = openTill(openStore(file, JSON.parse(readFileSync(file))));
    for await (const [key, result, body, debit] of till.resume()) {
      results.push([key, result, body, debit]);
      if (result !== "unknown") till.forget(key);
    }
  }
  return results;
}

const buy = (purchase, number) => openTill(openStore(`${String(number).padStart(4, "0")}.json`)).buy(...purchase);
process.stdout.write(JSON.stringify(purchases.length ? await Promise.all(purchases.map(buy)) : await resume()));
