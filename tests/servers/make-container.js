// make-container.js URL NAME: makes a blob container on Azure's emulator, with the emulator's well-known key.
const crypto = require("crypto");
const [url, name] = process.argv.slice(2);
const account = "devstoreaccount1";
const key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const headers = { "x-ms-date": new Date().toUTCString(), "x-ms-version": "2021-08-06" };
const signed = ["PUT", ...Array(11).fill("")].join("\n") + "\n"
  + Object.entries(headers).map(([header, value]) => `${header}:${value}\n`).join("")
  + `/${account}/${account}/${name}\nrestype:container`;
const signature = crypto.createHmac("sha256", Buffer.from(key, "base64")).update(signed).digest("base64");
headers.authorization = `SharedKey ${account}:${signature}`;
fetch(`${url}/${account}/${name}?restype=container`, { method: "PUT", headers })
  .then(async (answer) => {
    if (answer.status !== 201) throw new Error(`${answer.status}: ${await answer.text()}`);
  })
  .catch((error) => {
    console.error(`make-container.js: ${error.message}`);
    process.exit(1);
  });
